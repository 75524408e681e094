"""The wheel carries every file, and works outside the repository."""

import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

import dape

ROOT = Path(__file__).parents[1]
pytest.importorskip("hatchling", reason="needs hatchling, of the extra `test`")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder with the content of the wheel."""
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with ZipFile(wheel) as content:
        content.extractall(folder / "installed")
    return folder / "installed"


def run(installed, cwd, *words):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def relative(folder):
    files = (
        file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    )
    return {file.relative_to(folder) for file in files}


def test_the_wheel_has_every_file_of_the_package_and_the_recipes(installed):
    recipes = {"recipes" / file for file in relative(ROOT / "recipes")}
    assert relative(installed / "dape") == relative(ROOT / "src/dape") | recipes
    kinds = {file.suffix for file in relative(installed / "dape")}
    assert kinds >= {".cu", ".cuh", ".html", ".jinja", ".js", ".py", ".typed", ".yaml"}


def test_the_wheel_says_its_version_licence_and_extras(installed):
    (folder,) = installed.glob("dape-*.dist-info")
    metadata = (folder / "METADATA").read_text()
    assert f"\nVersion: {dape.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, flags=re.MULTILINE))
    assert extras == {"datasets", "docs", "harness", "test", "trackio", "wandb"}
    assert (folder / "licenses/LICENSE").is_file()


def test_outside_the_repository_recipes_templates_and_sources_are_found(installed, tmp_path):
    code = """
import dape, sys
from pathlib import Path
from dape.cli import main
assert Path(dape.__file__).is_relative_to(sys.argv[1])
assert not main(["--version"])
assert not main(["explore", "--out", "page.html"])
from dape.train import Recipe
from dape.train.recipe import read
assert read("recipes/demo.yaml", Recipe).training.length == 64
from importlib.resources import files
assert (files("dape.attention.fused.cuda") / "mix.cu").read_text()
"""
    printed = run(installed, tmp_path, "-c", code, str(installed))
    assert printed.startswith(f"dape {dape.__version__}\nwrote page.html")
    assert (tmp_path / "page.html").is_file()


def test_the_changelog_is_that_of_this_version():
    first = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first[1] == dape.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(-\w+(\.\d+)?)?", dape.__version__)
