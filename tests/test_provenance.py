"""Where a result comes from."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dape
from dape import provenance


def test_the_commit_is_that_of_the_checkout():
    head = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
    )
    if head.returncode:
        pytest.skip("the tests are not in a git checkout")
    assert provenance.commit().removesuffix("-dirty") == head.stdout.strip()


def test_a_package_that_git_does_not_track_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.commit() is None


def test_the_command_can_be_typed_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/dape", "eval", "runs/a b", "--lengths", "16"])
    assert provenance.provenance("cpu")["command"] == "dape eval 'runs/a b' --lengths 16"


def test_versions_and_device_are_those_of_this_process():
    found = provenance.provenance("cpu")
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["dape"] == dape.__version__
    assert found["device"].startswith("cpu (") and "threads" in found["device"]
