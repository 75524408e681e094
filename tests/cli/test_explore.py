"""`dape explore`: what its page holds, and what it refuses."""

import json
import re

import pytest

from folders import dape, make_run, prepare, refused


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore")
    return make_run(folder / "run", prepare(folder), "dape-kerple")


def content(file):
    page = file.read_text(encoding="utf-8")
    (data,) = re.findall(r'id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(data), page


def test_without_a_run_the_page_has_encodings_alone(tmp_path, capsys):
    file = tmp_path / "page.html"
    assert not dape("explore", "--out", file, "--heads", 3, "--train-length", 64)
    assert re.match(rf"wrote {re.escape(str(file))} \(0\.\d\d MB\)", capsys.readouterr().out)
    found, page = content(file)
    assert found["passage"] is None and 'id="tokens"' not in page
    (fire,) = (each for each in found["encodings"] if each["name"] == "fire")
    (start,) = fire["sets"]
    assert len(start["heads"]) == 3 and start["heads"][0]["L"] == pytest.approx(64)


def test_with_a_run_the_page_has_its_parameters_and_its_text(run, tmp_path):
    file = tmp_path / "page.html"
    assert not dape("explore", run, "--text", "a <b> & c", "--out", file)
    found, page = content(file)
    assert found["passage"]["tokens"] == list("a <b> & c")
    (kerple,) = (each for each in found["encodings"] if each["name"] == "kerple")
    assert [each["label"] for each in kerple["sets"]] == ["before training", "layer 0 of the model"]
    assert 'id="tokens"' in page and "dape explore" in page
    assert not dape("explore", run, "--length", 40, "--layers", 0, "--out", file)
    assert len(content(file)[0]["passage"]["tokens"]) == 40


def test_an_installed_package_has_no_commit_to_name(tmp_path, monkeypatch):
    monkeypatch.setattr("dape.provenance.commit", lambda: None)
    assert not dape("explore", "--out", tmp_path / "page.html")
    page = content(tmp_path / "page.html")[1]
    assert "commit: <code>installed package</code>" in page and "None" not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "a.png"), "--out a.png: the name must end in .html"),
        (("--length", 1), "--length 1: must be at least 2"),
        (("--text", "ab", "--document", 1), "--text and --document are both given"),
        (("--text", "a"), "--text has fewer than 2 tokens"),
        (("--text", "abc", "--layers", 1), "layer 1 is not one of 0 to 0"),
        (("--length", 999), "length 999: the longest"),
        (("--heads", 0, "--text", "ab"), "heads=0 must be at least 1"),
    ],
)
def test_mistakes_are_one_line(run, capsys, words, message):
    assert message in refused(capsys, "explore", run, *words)
