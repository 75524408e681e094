"""The table of a bias with a form, and the derivatives by the parameters, as an operator.

The kernels of attention sum products of dS and the derivatives. The operator therefore needs no
gradients.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dape.attention.fused.plan import planned, start
from dape.attention.fused.registered import register

if TYPE_CHECKING:
    from dape.attention.fused.forms import Form

# Entries of a tile.
ENTRIES = 32


def form_of(bias: nn.Module | None) -> tuple[str, list[Tensor]] | None:
    """Return name and parameters of the form of a bias, or None for a bias without a form.

    Without a bias the name is empty.
    """
    from dape.attention.fused.forms import FORMS

    if bias is None:
        return "", []
    found = FORMS.get(type(bias))
    if found is None:
        return None
    return name_of(type(bias)), [getattr(bias, name) for name in found.parameters]


def name_of(kind: type) -> str:
    """Return the whole name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


@cache
def form_named(name: str) -> "Form":
    """Return the form of the class with a name, B = 0 for an empty name."""
    from dape.attention.fused.forms import FORMS, Form, nothing

    named = {name_of(kind): form for kind, form in FORMS.items()}
    return named.get(name, Form(nothing))


def bias_tables(
    form: tuple[str, list[Tensor]], num_heads: int, count: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Return the tables of `Static` for a bias with a form, C alone if no parameter learns."""
    name, parameters = form
    learn = torch.is_grad_enabled() and any(x.requires_grad for x in parameters)
    # An operator knows the device by a tensor.
    given = [x.detach() for x in parameters] or [torch.empty(num_heads, device=device)]
    derivatives = len(parameters) if learn else 0
    found = operator(given, name, count, num_heads, derivatives)
    return (*found, torch.stack(parameters)) if learn else tuple(found)


def _tables(
    parameters: Sequence[Tensor], form: str, entries: int, heads: int, derivatives: int
) -> list[Tensor]:
    """Return C, and so many derivatives `[P, H, N]` if any."""
    return [*planned(_made, parameters, form, entries, heads, derivatives)]


def _made(
    parameters: Sequence[Tensor], form: str, entries: int, heads: int, derivatives: int
) -> list[Tensor]:
    """Return the tables of parameters, which the numbers of the operator follow."""
    from dape.attention.fused import table_kernels as kernels
    from dape.attention.fused.sizes import cdiv, padded

    found = _fake(parameters, form, entries, heads, derivatives)
    start(kernels.static_table_kernel, (cdiv(entries, ENTRIES),))(
        parameters[0], parameters[-1], found[0], found[-1], entries,
        H=heads, HEADS=padded(heads), FORM=form_named(form).function, DERIVATIVES=derivatives,
        N=ENTRIES, num_warps=4,
    )  # fmt: skip
    return found


def _fake(
    parameters: Sequence[Tensor], form: str, entries: int, heads: int, derivatives: int
) -> list[Tensor]:
    shapes = [(heads, entries), (derivatives, heads, entries)][: 2 if derivatives else 1]
    return [parameters[0].new_empty(shape, dtype=torch.float32) for shape in shapes]


operator = register(
    "form_tables_1(Tensor[] parameters, str form, SymInt entries, SymInt heads, "
    "SymInt derivatives) -> Tensor[]",
    _tables,
    _fake,
)
