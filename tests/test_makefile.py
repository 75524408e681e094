"""The virtual environment that `make` makes, where Python is too old or lacks pip."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(folder, script):
    """Make the environment by a Python that is a shell script."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    command = ["make", "-f", MAKEFILE, ".venv/bin/python", f"PYTHON={python}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_an_old_python_is_named_and_makes_no_environment(tmp_path):
    old = f"""
[ "$1" = -m ] && mkdir -p .venv/bin && touch .venv/bin/python && exit
exec {sys.executable} -c "import sys; sys.version_info = 3, 10, 13; exec(sys.argv[1])" "$2"
"""
    made = make(tmp_path, old)
    assert made.returncode and "dape needs Python 3.11 or later" in made.stderr
    assert not (tmp_path / ".venv").exists()


def test_an_environment_without_pip_does_not_stay(tmp_path):
    """Debian's Python without python3-venv makes .venv, and fails at pip."""
    debian = f"""
[ "$1" = -m ] || exec {sys.executable} "$@"
mkdir -p .venv/bin && touch .venv/bin/python
echo "ensurepip is not available" && exit 1
"""
    made = make(tmp_path, debian)
    assert made.returncode and "ensurepip is not available" in made.stdout
    assert not (tmp_path / ".venv").exists()
    made = make(tmp_path, debian.replace("exit 1", "exit 0"))
    assert not made.returncode and (tmp_path / ".venv/bin/python").exists()
