"""The fused kernels as operators of PyTorch, `dape::attend_2` and `dape::attend_backward_3`."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dape.attention.call import Attended, Call
from dape.attention.fused import decode_operator
from dape.attention.fused.plan import planned
from dape.attention.fused.problem import Result, problem_of, with_rows
from dape.attention.fused.sizes import MOST_ROWS
from dape.attention.fused.tables import tables
from dape.attention.fused.terms import learned, mixes
from dape.registered import below_autograd, first_derivative, register, straight


def attend(call: Call, backend: str) -> Attended:
    """Return output and log-sum-exp of a call without an obstacle by `serves.obstacle`.

    An output wider than the value is the sum of two numbers in the dtype of the value.
    """
    query, mask, shift = call.query, call.mask, cast(int, call.shift)
    rows, keys = query.shape[2], call.key.shape[2]
    seen = None if mask is None else mask[:, 0, 0].expand(query.shape[0], keys).contiguous()
    sources = decode_operator.sources_of(call)
    if sources is not None:
        given = query, call.key, call.value, seen, call.scale, call.causal, shift
        return Attended(*decode_operator.decoded(*given, *sources))
    count = max(keys - min(0, shift), rows + shift)
    found = tables(call.bias, call.adapter, query.shape[1], count, query.device, call.key_offset)
    begun = call.begun
    if begun is not None:
        begun = begun[:, 0, 0].expand(query.shape[0]).contiguous()
    wide = call.result != call.value.dtype
    trains = torch.is_grad_enabled() and any(table.requires_grad for table in found)
    exact = wide or (trains and mixes(found))
    out, lse, rest, _ = solved(
        query, call.key, call.value, found, seen, begun, call.scale, call.causal, shift,
        call.halo, backend, exact,
    )  # fmt: skip
    if wide:
        out = out.to(call.result) + (rest.to(call.result) if rest.numel() else 0)
    return Attended(out, lse)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    mask: Tensor | None,
    begun: Tensor | None,
    scale: float,
    causal: bool,
    offset: int,
    halo: Sequence[int],
    backend: str,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the `Result` of a `Problem`, made of the arguments."""
    given = (query, key, value, mask, begun, *tables)
    how = scale, causal, offset, tuple(halo), backend, exact
    return Result(*planned(_solved, given, *how, once=query.shape[2] <= MOST_ROWS))


def _solved(
    given: Sequence[Any],
    scale: float,
    causal: bool,
    offset: int,
    halo: tuple[int, int],
    backend: str,
    exact: bool,
) -> Result:
    """Return the result for the tensors of a problem."""
    from dape.attention.fused.passes import forward

    query, key, value, mask, begun, *tables = given
    problem = problem_of(query, key, value, tables, mask, scale, causal, offset, halo, begun)
    return forward(problem, backend, exact)


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, tables: Sequence[Tensor], *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    narrow = query.dtype != torch.float32
    rest = torch.empty_like(out) if narrow and others[-1] else query.new_empty(0)
    flags = int(narrow and mixes(tables))
    return out, lse, rest, query.new_empty(flags, dtype=torch.int32)


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    mask: Tensor | None,
    begun: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    flag: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    causal: bool,
    offset: int,
    halo: Sequence[int],
    backend: str,
    learns: bool,
) -> list[Tensor]:
    """Return the gradients of query, key, value and, if they learn, the tables."""
    if grad_lse is not None:  # rows without a visible key have no gradient
        grad_lse = grad_lse.contiguous().masked_fill(lse == -torch.inf, 0)
    given = (query, key, value, mask, begun, out, lse, rest, flag, grad_out, grad_lse, *tables)
    return [*planned(_gradients, given, scale, causal, offset, tuple(halo), backend, learns)]


def _gradients(
    given: Sequence[Any],
    scale: float,
    causal: bool,
    offset: int,
    halo: tuple[int, int],
    backend: str,
    learns: bool,
) -> list[Tensor]:
    """Return the gradients for the tensors of a problem, of its result and of its gradients."""
    from dape.attention.fused.passes import backward

    query, key, value, mask, begun, out, lse, rest, flag, grad_out, grad_lse, *tables = given
    problem = problem_of(query, key, value, tables, mask, scale, causal, offset, halo, begun)
    found = Result(out, lse, rest, flag)
    return backward(problem, backend, found, with_rows(grad_out), grad_lse, learns)


def _backward_fake(
    query: Tensor, key: Tensor, value: Tensor, tables: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    gradients = [torch.empty_like(with_rows(x)) for x in (query, key, value)]
    return [*gradients, *(torch.empty_like(x).contiguous() for x in learned(tables, rest[-1]))]


class _Attend(torch.autograd.Function):
    """The operator with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        begun: Tensor | None,
        how: tuple[Any, ...],
        exact: bool,
        *tables: Tensor,
    ) -> tuple[Tensor, ...]:
        given = query, key, value, tables, mask, begun
        found = solved(*given, *how, exact)
        ctx.how = how
        ctx.save_for_backward(query, key, value, mask, begun, *found, *tables)
        ctx.mark_non_differentiable(*found[2:])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @first_derivative
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_others: None
    ) -> tuple[Any, ...]:
        query, key, value, mask, begun, out, lse, rest, flag, *tables = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        found = differentiated(
            query, key, value, tables, mask, begun, out, lse, rest, flag, grad_out, grad_lse,
            *ctx.how, any(ctx.needs_input_grad[7:]),
        )  # fmt: skip
        without = [None] * (len(tables) - len(found) + 3)
        return *found[:3], None, None, None, None, *without, *found[3:]


def _with_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    mask: Tensor | None,
    begun: Tensor | None,
    *how: Any,
) -> tuple[Tensor, ...]:
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *tables))
    if tracked:
        return _Attend.apply(query, key, value, mask, begun, how[:-1], how[-1], *tables)
    return below_autograd(forward_operator, query, key, value, tables, mask, begun, *how)


_PROBLEM = "Tensor query, Tensor key, Tensor value, Tensor[] tables, Tensor? mask, Tensor? begun"
_HOW = "float scale, bool causal, SymInt offset, SymInt[] halo, str backend"
forward_operator = register(
    f"attend_2({_PROBLEM}, {_HOW}, bool exact) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _with_gradients,
)  # fmt: skip
solved = straight(forward_operator, _forward)
backward_operator = register(
    f"attend_backward_3({_PROBLEM}, Tensor out, Tensor lse, Tensor rest, Tensor flag, "
    f"Tensor grad_out, Tensor? grad_lse, {_HOW}, bool learns) -> Tensor[]",
    _backward,
    _backward_fake,
)
differentiated = straight(backward_operator, _backward)
