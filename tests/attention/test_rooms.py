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
