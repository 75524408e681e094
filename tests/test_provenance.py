"""Where a result comes from."""

import shutil
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


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository that tracks the package and results, with the commit in it."""
    for name in ("src/provenance.py", "results/table.md", ".gitignore"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("ignored\n")
    for words in (
        ("init", "--quiet"),
        ("add", "."),
        ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "first"),
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "src/provenance.py"))
    return tmp_path, provenance.commit()


def test_files_that_are_not_tracked_and_results_leave_a_commit_clean(checkout):
    folder, clean = checkout
    assert len(clean) == 40
    for name in ("ignored", "data.bin", "src/new.py", "results/table.md"):
        (folder / name).write_text("of a run")
    assert provenance.commit() == clean


def test_a_copied_checkout_is_clean_and_a_changed_one_dirty(
    checkout, tmp_path_factory, monkeypatch
):
    folder, clean = checkout
    copy = tmp_path_factory.mktemp("copied") / "checkout"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # other times and modes
    source = copy / "src/provenance.py"
    source.chmod(0o755)
    monkeypatch.setattr(provenance, "__file__", str(source))
    assert provenance.commit() == clean
    source.write_text("changed")
    assert provenance.commit() == f"{clean}-dirty"
    source.write_text("ignored\n")
    (copy / ".gitignore").unlink()
    assert provenance.commit() == f"{clean}-dirty"


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


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("/usr/bin/dape", "dape"),
        ("/lib/dape/__main__.py", "dape"),
        ("benchmarks/bars.py", "python benchmarks/bars.py"),
    ],
)
def test_the_command_is_the_one_that_started_the_process(monkeypatch, script, words):
    monkeypatch.setattr(sys, "argv", [script, "attention"])
    assert provenance.provenance("cpu")["command"] == f"{words} attention"
