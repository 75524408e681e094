import re

import torch
from pages import execute, text


def test_its_python_runs_and_gives_the_shapes_it_says():
    names = execute("README.md")
    assert names["out"].shape == names["query"].shape == (1, 12, 256, 64)
    assert names["tokens"].shape == (1, 16) and names["tokens"].dtype == torch.long


def test_the_releases_of_transformers_are_those_that_the_tests_run():
    def release(file):
        return re.search(r"transformers==(\d+)\.(\d+)", text(file)).groups()

    oldest, (major, minor) = release("constraints.txt"), release("newest.txt")
    assert f"transformers {'.'.join(oldest)} to {major}.{minor}." in text("README.md")
    bounds = f"transformers>={'.'.join(oldest)},<{major}.{int(minor) + 1}"
    assert f'"{bounds}"' in text("pyproject.toml")
