"""The files of the fused kernels: imports without a circle, and functions of a readable length."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import dape.attention.fused as fused

FOLDER = Path(fused.__path__[0])
FILES = {
    ".".join((fused.__name__, *path.relative_to(FOLDER).with_suffix("").parts)): path
    for path in FOLDER.rglob("*.py")
    if path.stem != "__init__"
}


def imported(path):
    """Return the files of the folder that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    return names & FILES.keys()


def test_no_two_files_import_each_other():
    graph = {name: imported(path) for name, path in FILES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError for a circle
    assert set(order) == FILES.keys()
    assert order.index("dape.attention.fused.terms") < order.index("dape.attention.fused.passes")


def test_functions_outside_kernels_have_80_lines_at_most_and_kernels_120():
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                most = 120 if "jit" in "".join(map(ast.unparse, node.decorator_list)) else 80
                assert node.end_lineno - node.lineno < most, node.name


def test_functions_in_cuda_have_120_lines_of_120_columns_at_most():
    sources = [path for path in FOLDER.rglob("*.cu*") if path.suffix in (".cu", ".cuh")]
    assert len(sources) > 5
    for path in sources:
        text = path.read_text()
        assert max(map(len, text.splitlines())) <= 120, path.name
        for found in re.finditer(r"^[^\s#/}].*?^}", text, re.MULTILINE | re.DOTALL):
            head = found[0].partition("{")[0]
            assert "struct " in head or found[0].count("\n") < 120, head
