"""The fused kernels as operators of PyTorch, `dape::attend_3` and `dape::attend_backward_3`."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dape.attention.call import Attended, Call
from dape.attention.fused.plan import planned
from dape.attention.fused.problem import Problem, Result
from dape.attention.fused.registered import below_autograd, register
from dape.attention.fused.sizes import MOST_ROWS
from dape.attention.fused.table_operators import TABLES_HOW, How, tables_fake, tables_made
from dape.attention.fused.table_operators import gradients as table_gradients
from dape.attention.fused.tables import further, mixes_scores, recipe, tables
from dape.attention.fused.terms import terms_of

# Numbers that tell how tables are made, and the numbers of tables that are ready.
MAKING, NO_RECIPE = len(How._fields), How("", 0, 0)


def attend(call: Call, backend: str) -> Attended:
    """Return output and log-sum-exp of a call without an obstacle by `serves.obstacle`.

    An output wider than the value is the sum of two numbers in the dtype of the value.
    """
    query, mask, shift = call.query, call.mask, cast(int, call.shift)
    rows, keys = query.shape[2], call.key.shape[2]
    count = max(keys - min(0, shift), rows + shift)
    of_call = call.bias, call.adapter, query.shape[1], count, query.device
    found = recipe(*of_call)
    sources, making = found or ((), NO_RECIPE)
    ready = further(call.adapter) if found else tables(*of_call, call.key_offset)
    seen = None if mask is None else mask[:, 0, 0].expand(query.shape[0], keys).contiguous()
    begun = call.begun
    if begun is not None:
        begun = begun[:, 0, 0].expand(query.shape[0]).contiguous()
    wide = call.result != call.value.dtype
    trains = torch.is_grad_enabled() and any(requires_grad(x) for x in (*sources, *ready))
    exact = wide or (trains and (len(ready) > 1 or mixes_scores(call.adapter)))
    out, lse, rest, *_ = forward_operator(
        query, call.key, call.value, ready, sources, seen, begun, *making, call.scale, call.causal,
        shift, call.halo, backend, exact,
    )  # fmt: skip
    if wide:
        out = out.to(call.result) + (rest.to(call.result) if rest.numel() else 0)
    return Attended(out, lse)


def requires_grad(x: Tensor | None) -> bool:
    """Return whether there is a tensor that requires a gradient."""
    return x is not None and x.requires_grad


def with_rows(x: Tensor) -> Tensor:
    """Return `x` with a contiguous last axis, for the kernels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def problem_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    causal: bool,
    offset: int,
    halo: Sequence[int] = (0, 0),
    begun: Tensor | None = None,
) -> Problem:
    """Return the problem of an operator's arguments, with contiguous rows."""
    return Problem(
        query=with_rows(query),
        key=with_rows(key),
        value=with_rows(value),
        terms=terms_of([table.contiguous() for table in tables]),
        mask=mask,
        scale=scale,
        causal=causal,
        offset=offset,
        halo=(halo[0], halo[1]),
        begun=begun,
    )


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    sources: Sequence[Tensor | None],
    mask: Tensor | None,
    begun: Tensor | None,
    *how: Any,
) -> tuple[Any, ...]:
    """Return the `Result` of a `Problem`, and the tables made of the sources."""
    making, call = How(*how[:MAKING]), hashable(how[MAKING:])
    given = (query, key, value, mask, begun, *sources, *tables)
    once = query.shape[2] <= MOST_ROWS
    found = planned(_solved, given, len(sources), making, *call, once=once)
    return *found[:4], [*found[4:]]


def _solved(
    given: Sequence[Any],
    sourced: int,
    making: How,
    scale: float,
    causal: bool,
    offset: int,
    halo: tuple[int, int],
    backend: str,
    exact: bool,
) -> list[Tensor]:
    """Return result and made tables for the tensors of a problem, of which some are sources."""
    from dape.attention.fused.passes import forward

    query, key, value, mask, begun, *others = given
    made = tables_made(others[:sourced], making) if sourced else []
    tables = [*made, *others[sourced:]]
    problem = problem_of(query, key, value, tables, mask, scale, causal, offset, halo, begun)
    return [*forward(problem, backend, exact), *made]


def hashable(how: Sequence[Any]) -> tuple[Any, ...]:
    """Return arguments with tuples for lists."""
    return tuple([tuple(x) if isinstance(x, list) else x for x in how])


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    sources: Sequence[Tensor | None],
    mask: Tensor | None,
    begun: Tensor | None,
    *how: Any,
) -> tuple[Any, ...]:
    made = tables_fake(*sources, *how[:MAKING]) if sources else []
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    narrow = query.dtype != torch.float32
    rest = torch.empty_like(out) if narrow and how[-1] else query.new_empty(0)
    flags = int(narrow and len(tables) + len(made) > 1)
    return out, lse, rest, query.new_empty(flags, dtype=torch.int32), made


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    sources: Sequence[Tensor | None],
    mask: Tensor | None,
    begun: Tensor | None,
    made: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    flag: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    *how: Any,
) -> list[Tensor]:
    """Return the gradients of query, key, value, the sources that are there, and the tables."""
    if grad_lse is not None:  # rows without a visible key have no gradient
        grad_lse = grad_lse.contiguous().masked_fill(lse == -torch.inf, 0)
    result = (out, lse, rest, flag, grad_out, grad_lse)
    given = (query, key, value, mask, begun, *result, *sources, *made, *tables)
    making, call = How(*how[:MAKING]), hashable(how[MAKING:])
    return [*planned(_gradients, given, len(sources), len(made), making, *call)]


def _gradients(
    given: Sequence[Any],
    sourced: int,
    number: int,
    making: How,
    scale: float,
    causal: bool,
    offset: int,
    halo: tuple[int, int],
    backend: str,
) -> list[Tensor]:
    """Return the gradients for the tensors of a problem, some of them sources or made tables."""
    from dape.attention.fused.passes import backward

    query, key, value, mask, begun, out, lse, rest, flag, grad_out, grad_lse, *others = given
    sources, tables = others[:sourced], others[sourced:]
    problem = problem_of(query, key, value, tables, mask, scale, causal, offset, halo, begun)
    result = Result(out, lse, rest, flag)
    found = backward(problem, backend, result, with_rows(grad_out), grad_lse)
    by_tensors, by_made, by_tables = found[:3], found[3 : 3 + number], found[3 + number :]
    by_sources = table_gradients((*sources, *by_made), making) if sourced else []
    return [*by_tensors, *by_sources, *by_tables]


def _backward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    sources: Sequence[Tensor | None],
    *others: object,
) -> list[Tensor]:
    gradients = [torch.empty_like(with_rows(x)) for x in (query, key, value)]
    by_sources = [x.new_empty(x.shape) for x in sources if x is not None]
    return [*gradients, *by_sources, *(torch.empty_like(x).contiguous() for x in tables)]


class _Attend(torch.autograd.Function):
    """The operator with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        begun: Tensor | None,
        how: tuple[Any, ...],
        sourced: int,
        *others: Tensor | None,
    ) -> tuple[Tensor, ...]:
        sources, tables = others[:sourced], others[sourced:]
        given = query, key, value, tables, sources, mask, begun
        *found, made = below_autograd(forward_operator, *given, *how)
        ctx.how, ctx.ends = how[:-1], (sourced, sourced + len(made))
        ctx.save_for_backward(query, key, value, mask, begun, *found, *sources, *made, *tables)
        ctx.mark_non_differentiable(*found[2:], *made)
        ctx.set_materialize_grads(False)
        return *found, *made

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_others: None
    ) -> tuple[Any, ...]:
        query, key, value, mask, begun, out, lse, rest, flag, *others = ctx.saved_tensors
        first, last = ctx.ends
        sources, made, tables = others[:first], others[first:last], others[last:]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        found = backward_operator(
            query, key, value, tables, sources, mask, begun, made, out, lse, rest, flag, grad_out,
            grad_lse, *ctx.how,
        )  # fmt: skip
        gradients = iter(found[3:])
        by_others = [None if x is None else next(gradients) for x in (*sources, *tables)]
        return *found[:3], None, None, None, None, *by_others


def _with_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    sources: Sequence[Tensor | None],
    mask: Tensor | None,
    begun: Tensor | None,
    *how: Any,
) -> tuple[Any, ...]:
    tracked = (query, key, value, *sources, *tables)
    if torch.is_grad_enabled() and any(requires_grad(x) for x in tracked):
        given = (query, key, value, mask, begun, how, len(sources))
        found = _Attend.apply(*given, *sources, *tables)
        return *found[:4], [*found[4:]]
    return below_autograd(forward_operator, query, key, value, tables, sources, mask, begun, *how)


_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor[] tables, Tensor?[] sources, Tensor? mask, "
    "Tensor? begun"
)
_HOW = f"{TABLES_HOW}, float scale, bool causal, SymInt offset, SymInt[] halo, str backend"
forward_operator = register(
    f"attend_3({_PROBLEM}, {_HOW}, bool exact) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _forward, _forward_fake, _with_gradients,
)  # fmt: skip
backward_operator = register(
    f"attend_backward_3({_PROBLEM}, Tensor[] made, Tensor out, Tensor lse, Tensor rest, "
    f"Tensor flag, Tensor grad_out, Tensor? grad_lse, {_HOW}) -> Tensor[]",
    _backward,
    _backward_fake,
)
