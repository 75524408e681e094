"""The form of a bias by name, with the parameters of the bias; `forms` has the forms in Triton."""

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from dape.attention.fused.forms import Form

# Rows of a parameter that a program of the backward pass can sum by.
MOST_ROWS = 128


class Formed(NamedTuple):
    """The name of the form of a bias, its parameters, and the span; B = 0 for an empty name."""

    name: str = ""
    p0: Tensor | None = None
    p1: Tensor | None = None
    span: int = 0


def form_of(bias: nn.Module | None) -> Formed | None:
    """Return the form of a bias with its parameters, or None for a bias without a form."""
    from dape.attention.fused.forms import FORMS

    if bias is None:
        return Formed()
    found = FORMS.get(type(bias))
    if found is None:
        return None
    p0, p1 = (*(getattr(bias, name) for name in found.parameters), None, None)[:2]
    span = 0 if found.span is None else getattr(bias, found.span)
    if rows_of(p0, span) > MOST_ROWS:
        return None
    return Formed(name_of(type(bias)), p0, p1, span)


def name_of(kind: type) -> str:
    """Return the whole name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


@cache
def form_named(name: str) -> "Form":
    """Return the form of the class with a name, B = 0 for an empty name."""
    from dape.attention.fused.forms import FORMS, Form, nothing

    named = {name_of(kind): form for kind, form in FORMS.items()}
    return named.get(name, Form(nothing))


def rows_of(p0: Tensor | None, span: int) -> int:
    """Return how many rows the parameter of a form has, 0 for a form without a span."""
    return 0 if p0 is None or span == 0 else p0.shape[0]
