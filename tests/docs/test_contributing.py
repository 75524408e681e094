"""The recipes of CONTRIBUTING.md, followed to the letter in a copy, leave the tests green."""

import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from pages import ROOT, text

# Tests of every scheme, and tests that concern what the recipes add.
LOOKING = (
    "tests/docs/test_encodings.py",
    "tests/figures/test_style.py",
    "tests/figures/test_bias_maps.py",
    "tests/evaluate/test_compare.py",
    "tests/cli/test_info.py",
    "tests/positions",
    "tests/model/test_schemes.py",
    "tests/model/test_packing.py",
    "tests/model/test_retrofit_mount.py",
    "tests/model/test_retrofit_generation.py",
    "tests/test_followed.py",
)
FILES = r"In (`[^`]+`(?:(?:, | and )`[^`]+`)*), "
STEP = re.compile(
    rf"{FILES}add `(?P<added>[^`]+)` after `(?P<after>[^`]+)`\."
    r"|In `(?P<importer>[^`]+)`, import `(?P<name>\w+)` from `(?P<module>[\w.]+)`\."
    r"|In `(?P<file>[^`]+)`, before `(?P<before>[^`]+)`:\n\n```\w+\n(?P<code>.*?)^```$"
    r"|In the new file `(?P<new>[^`]+)`:\n\n```\w+\n(?P<whole>.*?)^```$"
    r"|At the end of `(?P<ended>[^`]+)`:\n\n```\w+\n(?P<end>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)


def follow(folder, step):
    """Change a copy of the repository as a step of a recipe says."""
    if step["added"]:
        for file in re.findall(r"`([^`]+)`", step[1]):
            new = step["after"].removesuffix("]") + f", {step['added']}]"
            replace(folder / file, step["after"], new)
    elif step["importer"]:
        path, start = folder / step["importer"], f"from {step['module']} import "
        wrapped = f"{start}(\n" in path.read_text()
        start, gap = (f"{start}(\n    ", "\n    ") if wrapped else (start, " ")
        replace(path, start, f"{start}{step['name']},{gap}")
    elif step["new"]:
        (folder / step["new"]).write_text(step["whole"])
    elif step["file"]:
        path = folder / step["file"]
        (line,) = (each for each in path.read_text().splitlines() if step["before"] in each)
        indent = line[: len(line) - len(line.lstrip())]
        replace(path, f"{line}\n", f"{textwrap.indent(step['code'], indent)}{line}\n")
    else:
        path, gap = folder / step["ended"], "\n\n" * step["ended"].endswith(".py")
        path.write_text(f"{path.read_text()}{gap}{step['end']}")


def replace(path, old, new):
    """Replace the only place where a text stands."""
    whole = path.read_text()
    assert whole.count(old) == 1, (path, old)
    path.write_text(whole.replace(old, new))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of the repository in which all recipes were followed."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("src", "tests", "docs", "recipes", "results"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copyfile(ROOT / name, folder / name)
    page = text("CONTRIBUTING.md")
    steps = list(STEP.finditer(page))
    blocks = sum(any((step["code"], step["end"], step["whole"])) for step in steps)
    assert blocks == page.count("\n```\n")
    for step in steps:
        follow(folder, step)
    shutil.copyfile(ROOT / "tests/docs/followed.py", folder / "tests/test_followed.py")
    return folder


def run(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_following_the_recipes_leaves_the_tests_green(copy):
    chosen = (
        "not (test_schemes or test_packing or positions or retrofit) or square or temperature"
        " or forms or olmo2"
    )
    found = run(copy, "pytest", "-vv", "-p", "no:cacheprovider", "-k", chosen, *LOOKING)
    for name in ("square-root", "dape3-square-root", "temperature-kerple"):
        assert re.search(rf"test_a_cache_changes_nothing\[{name}\] PASSED", found)
    assert re.search(r"test_the_logits_start_as_the_models_own\[dtype0-olmo2\] PASSED", found)


def test_the_code_of_the_recipes_is_formatted_as_ours(copy):
    run(copy, "ruff", "check", "--ignore", "I001", "src")
    changed = (
        *("positions/bias", "positions/adapter", "attention/double"),
        *("train", "evaluate", "cli", "model/retrofit"),
    )
    named = [copy / "src/dape" / name for name in changed]
    run(copy, "ruff", "format", "--check", *(str(p if p.is_dir() else f"{p}.py") for p in named))
