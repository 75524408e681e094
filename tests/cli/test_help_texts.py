"""Help texts: the docstring below a field of a dataclass that a command or a recipe reads."""

import ast
from pathlib import Path

import pytest

import dape

SOURCE = Path(dape.__file__).parent


def documented(tree):
    """Yield the class, the field and the docstring below it."""
    for owner in ast.walk(tree):
        if isinstance(owner, ast.ClassDef):
            for field, text in zip(owner.body, owner.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    yield owner.name, field.target.id, ast.literal_eval(text.value)


def texts():
    for path in sorted(SOURCE.rglob("*.py")):
        for owner, field, text in documented(ast.parse(path.read_text())):
            yield pytest.param(text, id=f"{path.relative_to(SOURCE)}:{owner}.{field}")


@pytest.mark.parametrize("text", list(texts()))
def test_a_help_text_is_one_line_that_names_the_option(text):
    assert "\n" not in text, "tyro keeps the line break: write one line"
    first = text.split()[0].strip(":,;")
    assert first not in ("of", "to", "what", "which", "whether", "that", "how", "where")
