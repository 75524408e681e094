"""Imports point in a single direction, between files and between folders."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dape

FOLDER = Path(dape.__path__[0])
# A folder imports no folder on its right.
ORDER = (
    *("data", "positions", "attention", "model", "train", "evaluate", "chomsky", "bench"),
    *("figures", "paper", "cli"),
)


def name_of(path):
    parts = path.relative_to(FOLDER.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in FOLDER.rglob("*.py")}


def imported(text, files):
    """Return the files that a text imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{each.name}" for each in node.names}
            names |= (whole & files) or {node.module}
        elif isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
    return names & files


@pytest.fixture(scope="module")
def graph():
    """Return the files that each file imports; to read them all takes most of a second."""
    return {name: imported(path.read_text(), FILES.keys()) - {name} for name, path in FILES.items()}


def test_no_two_files_import_each_other(graph):
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError for a circle
    assert set(order) == FILES.keys()
    assert order.index("dape.attention.fused.terms") < order.index("dape.attention.fused.passes")


def test_a_circle_is_found():
    texts = {"a": "def f():\n    from b import x", "b": "import c", "c": "from a import f"}
    graph = {name: imported(text, texts.keys()) for name, text in texts.items()}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_no_folder_imports_a_folder_above(graph):
    assert {name.split(".")[1] for name in FILES if name.count(".") > 1} == set(ORDER)
    for name, others in graph.items():
        if name.count(".") > 1:
            for other in others:
                if other.count(".") > 1:
                    own, used = (ORDER.index(each.split(".")[1]) for each in (name, other))
                    assert used <= own, f"{name} imports {other}"
