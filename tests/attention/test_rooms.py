"""The files of the fused kernels: functions of a readable length."""

import ast
import re
from pathlib import Path

import dape.attention.fused as fused

FOLDER = Path(fused.__path__[0])


def test_launchers_start_kernels_so_that_a_plan_may_note_them():
    texts = [path.read_text() for path in FOLDER.rglob("*.py")]
    assert sum(text.count("start(kernels.") for text in texts) > 30
    assert not [text for text in texts if re.search(r"_kernel\[", text)]


def test_every_kernel_waits_for_the_kernel_before_at_first():
    kernels = {}
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels[node.name] = ast.unparse(node.body[1])  # after the docstring
    assert len(kernels) > 30
    assert set(kernels.values()) == {"follow(CHAINED)"}
    sources = [path.read_text() for path in FOLDER.rglob("*.cu")]
    heads = [part.partition("{\n")[2] for text in sources for part in text.split("__global__")[1:]]
    assert len(heads) > 7
    assert {head.splitlines()[0].strip() for head in heads} == {"follow();"}


def test_functions_outside_kernels_have_80_lines_at_most_and_kernels_120():
    for path in FOLDER.rglob("*.py"):
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
