"""Whether the hub answers, by the HTTP library of any release of `huggingface_hub`."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dape.data.hub import reachable


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(404)  # an answer all the same
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def test_a_hub_that_answers_is_reachable_and_a_closed_one_is_not(server):
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    assert reachable(seconds=5.0)
    thread.join()
    server.server_close()
    assert not reachable(seconds=5.0)


def test_no_request_is_sent_offline(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not reachable(seconds=5.0)
