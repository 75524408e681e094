"""The tables of a bias and an adapter as operators of PyTorch.

A kernel makes the tables, and two kernels take the gradients back. `registered` explains the
numbers in the names of operators.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dape.attention.fused.formed import form_named, rows_of
from dape.attention.fused.plan import planned, start
from dape.registered import below_autograd, first_derivative, register, straight

# Entries of a tile, and programs of the backward pass. A program computes a partial sum.
ENTRIES, PROGRAMS = 32, 128


class How(NamedTuple):
    """How the tables follow from the inputs.

    Args:
        form: the name of the form of the bias, empty for B from a tensor and for B = 0.
        entries: how many entries the tables have.
        heads: how many heads.
        on_bias: the first column of W1 on B, or -1.
        residual: whether C holds B.
        linear: whether C lacks `W2 phi(U)`.
        one_constant: whether b1 and b2 meet the first entry alone.
        span: the whole number of a form whose parameter has rows, else 0.
        derivatives: how many derivatives of C by parameters follow C, without an adapter.
    """

    form: str
    entries: int
    heads: int
    on_bias: int = -1
    residual: bool = True
    linear: bool = False
    one_constant: bool = False
    span: int = 0
    derivatives: int = 0


_TENSORS = "Tensor? values, Tensor? p0, Tensor? p1, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2"
_HOW = (
    "str form, SymInt entries, SymInt heads, SymInt on_bias, bool residual, bool linear, "
    "bool one_constant, SymInt span, SymInt derivatives"
)


def _sizes(w1: Tensor | None) -> tuple[int, int]:
    """Return the numbers of hidden units and taps."""
    return (0, 1) if w1 is None else (w1.shape[0], w1.shape[2])


def _compiled(w1: Tensor | None, how: How) -> dict[str, Any]:
    """Return the compile-time sizes."""
    from dape.attention.fused.sizes import padded

    units, taps = _sizes(w1)
    return {
        "H": how.heads, "D": units, "T": taps,
        "HEADS": padded(how.heads), "UNITS": padded(units),
    }  # fmt: skip


def _switches(values: Tensor | None, p0: Tensor | None, how: How) -> dict[str, Any]:
    """Return the compile-time arguments besides sizes."""
    return {
        "FORM": form_named(how.form).function, "GIVEN": values is not None,
        "ROWS": rows_of(p0, how.span),
        "ON_BIAS": how.on_bias, "RESIDUAL": how.residual, "LINEAR": how.linear,
        "ONE_CONSTANT": how.one_constant,
    }  # fmt: skip


def _forward(*given: Any) -> list[Tensor]:
    """Return C, then U, W1 and W2 with an adapter, or the derivatives of C without an adapter."""
    return [*planned(_made, given[:7], How(*given[7:]))]


def _made(given: Sequence[Any], how: How) -> list[Tensor]:
    """Return the tables of some tensors."""
    from dape.attention.fused import table_kernels as kernels
    from dape.attention.fused.sizes import cdiv

    values, p0, p1, w1, b1, w2, b2 = given
    found = _forward_fake(*given, *how)
    static, grid = found[0], (cdiv(how.entries, ENTRIES),)
    known = tuple(static if x is None else x for x in (values, p0, p1))
    compiled, switches = _compiled(w1, how), _switches(values, p0, how)
    if w1 is None:
        start(kernels.static_table_kernel, grid)(
            *known[1:], static, found[-1], how.entries, how.span,
            H=compiled["H"], HEADS=compiled["HEADS"], FORM=switches["FORM"],
            ROWS=switches["ROWS"], DERIVATIVES=how.derivatives, N=ENTRIES, num_warps=4,
        )  # fmt: skip
    else:
        start(kernels.tables_kernel, grid)(
            *known, w1, b1, w2, b2, *found, how.entries, how.span, w1.shape[1],
            **compiled, **switches, N=ENTRIES, num_warps=4,
        )  # fmt: skip
    return found


def _forward_fake(
    values: Tensor | None,
    p0: Tensor | None,
    p1: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    how = How(*rest)
    like = next(x for x in (w1, values, p0) if x is not None)
    units, taps = _sizes(w1)
    shapes: list[tuple[int, ...]] = [(how.heads, how.entries)]
    if w1 is not None:
        width = taps * units
        shapes += [(how.entries, width), (width, how.heads), (how.heads, width)]
    elif how.derivatives:
        shapes.append((how.derivatives, how.heads, how.entries))
    return [like.new_empty(shape, dtype=torch.float32) for shape in shapes]


def _backward(*given: Any) -> list[Tensor]:
    """Return the gradients of all tensors but None. DAPE V2 ignores the gradient of b1."""
    return [*planned(_gradients, (*given[:7], *given[7]), How(*given[8:]))]


def _gradients(given: Sequence[Any], how: How) -> list[Tensor]:
    """Return the gradients of some tensors from those of the tables, which follow them."""
    from dape.attention.fused import table_kernels as kernels
    from dape.attention.fused.sizes import cdiv, next_power_of_2, padded

    tensors, grads = given[:7], [x.contiguous() for x in given[7:]]
    values, p0, p1, w1, b1, w2, _ = tensors
    found = _backward_fake(*tensors, grads, *how)
    compiled, switches = _compiled(w1, how), _switches(values, p0, how)
    heads, units, taps = (compiled[name] for name in ("HEADS", "UNITS", "T"))
    rows = switches["ROWS"]
    most_rows = padded(rows) if rows else 0
    size = 2 * heads if w1 is None else 3 * heads + units + (taps + 1) * heads * units
    size += most_rows * heads
    per_program = cdiv(cdiv(how.entries, PROGRAMS), ENTRIES) * ENTRIES
    programs = cdiv(how.entries, per_program)
    static, hidden, w_in, w_out = (grads * 4)[:4] if w1 is None else grads
    parts = static.new_empty(programs, size)
    known = tuple(static if x is None else x for x in (values, p0, p1, w1, b1, w2))
    into = iter(found)
    unused = static.new_empty(how.heads)
    grad_values, grad_p0, grad_p1, grad_w1, grad_b1, grad_w2, grad_b2 = (
        unused if x is None else next(into) for x in tensors
    )
    channels, mixed = 0 if w1 is None else w1.shape[1], w1 is not None
    start(kernels.tables_backward_kernel, (programs,))(
        *known, static, hidden, grad_values, parts, how.entries, how.span, channels, per_program,
        size, **compiled, **switches, MOST_ROWS=most_rows, MIXED=mixed, N=ENTRIES, num_warps=4,
    )  # fmt: skip
    start(kernels.table_sums_kernel, (cdiv(size, 32),))(
        parts, w_in, w_out, grad_p0, grad_p1, grad_b2, grad_b1, grad_w1, grad_w2,
        programs, size, channels, **compiled, ON_BIAS=how.on_bias, LINEAR=how.linear,
        MIXED=mixed, ROWS=rows, MOST_ROWS=most_rows, PROGRAMS=next_power_of_2(programs), OUT=32,
        num_warps=4,
    )  # fmt: skip
    return found


def _backward_fake(
    values: Tensor | None,
    p0: Tensor | None,
    p1: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    grads: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    given = (values, p0, p1, w1, b1, w2, b2)
    return [x.new_empty(x.shape) for x in given if x is not None]


class _Tables(torch.autograd.Function):
    """The tables with gradients."""

    @staticmethod
    def forward(ctx: Any, how: How, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.how = how
        ctx.save_for_backward(*tensors)
        return tuple(tables(*tensors, *how))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        found = iter(tables_backward(*tensors, grads, *ctx.how))
        return None, *(None if x is None else next(found) for x in tensors)


def _with_gradients(*given: Any) -> list[Tensor]:
    tensors, how = given[:7], given[7:]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return list(_Tables.apply(How(*how), *tensors))
    return below_autograd(forward_operator, *given)


forward_operator = register(
    f"tables_3({_TENSORS}, {_HOW}) -> Tensor[]", _forward, _forward_fake, _with_gradients
)
tables = straight(forward_operator, _forward)
backward_operator = register(
    f"tables_backward_3({_TENSORS}, Tensor[] grads, {_HOW}) -> Tensor[]", _backward, _backward_fake
)
tables_backward = straight(backward_operator, _backward)


def _fire(log_c: Tensor, log_threshold: Tensor, count: int, offset: int) -> tuple[Tensor, Tensor]:
    """Return psi over the distances, and 1 / psi over the indices from `offset` on, for FIRE."""
    psi, scale = planned(_fire_made, (log_c, log_threshold), count, offset)
    return psi, scale


def _fire_made(given: Sequence[Any], count: int, offset: int) -> tuple[Tensor, Tensor]:
    """Return FIRE's tables of its parameters."""
    from dape.attention.fused import table_kernels as kernels
    from dape.attention.fused.sizes import cdiv

    log_c, log_threshold = given
    psi, scale = _fire_fake(log_c, log_threshold, count, offset)
    start(kernels.fire_kernel, (cdiv(count, 1024),))(
        log_c, log_threshold, psi, scale, count, offset, N=1024, num_warps=4
    )
    return psi, scale


def _fire_fake(
    log_c: Tensor, log_threshold: Tensor, count: int, offset: int
) -> tuple[Tensor, Tensor]:
    return (
        log_c.new_empty(count, dtype=torch.float32),
        log_c.new_empty(count, dtype=torch.float32),
    )


def _fire_backward(*given: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients of log c and log L."""
    by_c, by_threshold = planned(_fire_gradients, given[:4], given[4])
    return by_c, by_threshold


def _fire_gradients(given: Sequence[Any], offset: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of FIRE's parameters, which those of its tables follow."""
    from dape.attention.fused import table_kernels as kernels

    log_c, log_threshold, grad_psi, grad_scale = (x.contiguous() for x in given)
    found = torch.empty_like(log_c), torch.empty_like(log_threshold)
    start(kernels.fire_backward_kernel, (1,))(
        log_c, log_threshold, grad_psi, grad_scale, *found, len(grad_psi), offset,
        N=1024, num_warps=4,
    )  # fmt: skip
    return found


class _Fire(torch.autograd.Function):
    """The tables psi and 1 / psi of FIRE with gradients."""

    @staticmethod
    def forward(
        ctx: Any, log_c: Tensor, log_threshold: Tensor, count: int, offset: int
    ) -> tuple[Tensor, Tensor]:
        ctx.offset = offset
        ctx.save_for_backward(log_c, log_threshold)
        found: tuple[Tensor, Tensor] = fire_tables(log_c, log_threshold, count, offset)
        return found

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *fire_backward_operator(*ctx.saved_tensors, *grads, ctx.offset), None, None


def _fire_with_gradients(log_c: Tensor, log_threshold: Tensor, *how: int) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (log_c.requires_grad or log_threshold.requires_grad):
        return _Fire.apply(log_c, log_threshold, *how)
    return below_autograd(fire_operator, log_c, log_threshold, *how)


fire_operator = register(
    "fire_1(Tensor log_c, Tensor log_threshold, SymInt count, SymInt offset) -> (Tensor, Tensor)",
    _fire, _fire_fake, _fire_with_gradients,
)  # fmt: skip
fire_tables = straight(fire_operator, _fire)
fire_backward_operator = register(
    "fire_backward_1(Tensor log_c, Tensor log_threshold, Tensor grad_psi, Tensor grad_scale, "
    "SymInt offset) -> (Tensor, Tensor)",
    _fire_backward,
    lambda log_c, log_threshold, *rest: (torch.empty_like(log_c), torch.empty_like(log_threshold)),
)
