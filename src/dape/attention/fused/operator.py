"""The banded kernels as registered operators, and which calls they serve."""

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dape.attention.fused.tables import obstacle as table_obstacle
from dape.attention.fused.tables import tables

if TYPE_CHECKING:
    from dape.attention.fused.banded import Problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD, MOST_HEADS, MOST_UNITS = 128, 32, 64


def obstacle(
    backend: str,
    query: Float[Tensor, "batch heads query head_dim"],
    value: Float[Tensor, "batch kv_heads key value_dim"],
    bias: nn.Module | None,
    adapter: nn.Module | None,
    mask: Bool[Tensor, "#batch 1 #query key"] | None,
    query_offset: int | Int[Tensor, ""],
    positions_given: bool,
) -> str | None:
    """Return why the fused kernels cannot serve a call, or None if they can."""
    heads, units = query.shape[1], getattr(adapter, "hidden", 0)
    widest = max(query.shape[3], value.shape[3])
    reasons = [
        (positions_given, "positions are given, and the kernels count slots"),
        (not isinstance(query_offset, int), "query_offset is a tensor"),
        (mask is not None and mask.shape[2] > 1, "the mask differs between queries"),
        (query.dtype not in DTYPES, f"the dtype is {query.dtype}"),
        (widest > WIDEST_HEAD, f"head_dim={widest} is more than {WIDEST_HEAD}"),
        (heads > MOST_HEADS, f"{heads} heads are more than {MOST_HEADS}"),
        (units > MOST_UNITS, f"hidden={units} is more than {MOST_UNITS}"),
    ]
    found = next((reason for holds, reason in reasons if holds), None)
    found = found or table_obstacle(bias, adapter)
    if found is None and backend == "cuda" and adapter is not None:
        from dape.attention.fused import mix_cuda

        if heads > mix_cuda.MOST_HEADS or units > mix_cuda.MOST_UNITS:
            found = (
                f"{heads} heads and hidden={units} are more than {mix_cuda.MOST_HEADS} and "
                f"{mix_cuda.MOST_UNITS}"
            )
        elif query.dtype == torch.float32:
            found = "its scratch is fp16, too narrow for float32"
    return found


def attend_fused(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    value: Float[Tensor, "batch kv_heads key value_dim"],
    bias: nn.Module | None,
    adapter: nn.Module | None,
    mask: Bool[Tensor, "#batch 1 1 key"] | None,
    scale: float,
    causal: bool,
    query_offset: int,
    backend: str,
) -> Float[Tensor, "batch heads query value_dim"]:
    """Return the output of a call that has no `obstacle`."""
    rows, keys = query.shape[2], key.shape[2]
    found = tables(bias, adapter, query.shape[1], max(keys, rows + query_offset), query.device)
    static, hidden, weight_in, weight_out = [*found, None, None, None, None][:4]
    seen = None if mask is None else mask[:, 0, 0].expand(query.shape[0], keys).contiguous()
    out, _ = banded(
        query, key, value, static, hidden, weight_in, weight_out, seen, scale, causal,
        query_offset, backend,
    )  # fmt: skip
    return out


def mixer(backend: str) -> ModuleType:
    """Return the kernels across heads of a backend."""
    from dape.attention.fused import mix_cuda, mix_triton

    return mix_cuda if backend == "cuda" else mix_triton


def with_rows(x: Tensor) -> Tensor:
    """Return `x` with a contiguous last axis, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def problem_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor | None],
    mask: Tensor | None,
    scale: float,
    causal: bool,
    offset: int,
) -> "Problem":
    """Return the problem of an operator's arguments, with contiguous rows."""
    from dape.attention.fused.banded import Mixing, Problem

    given = [table.contiguous() for table in tables if table is not None]
    mixing = Mixing(*given) if len(given) == len(Mixing._fields) else None
    return Problem(
        query=with_rows(query),
        key=with_rows(key),
        value=with_rows(value),
        static=given[0] if given else None,
        mixing=mixing,
        mask=mask,
        scale=scale,
        causal=causal,
        offset=offset,
    )


@torch.library.custom_op("dape::banded", mutates_args=())
def banded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    static: Tensor | None,
    hidden: Tensor | None,
    weight_in: Tensor | None,
    weight_out: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of the rows; the arguments are those of `Problem`."""
    from dape.attention.fused.banded import forward

    tables = (static, hidden, weight_in, weight_out)
    problem = problem_of(query, key, value, tables, mask, scale, causal, offset)
    return forward(problem, mixer(backend))


@banded.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3]
    return query.new_empty(*shape, value.shape[3]), query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("dape::banded_backward", mutates_args=())
def banded_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    static: Tensor | None,
    hidden: Tensor | None,
    weight_in: Tensor | None,
    weight_out: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scale: float,
    causal: bool,
    offset: int,
    backend: str,
) -> list[Tensor]:
    """Return the gradients of the tensors up to `weight_out` that are given, in order."""
    from dape.attention.fused.banded import backward

    tables = (static, hidden, weight_in, weight_out)
    problem = problem_of(query, key, value, tables, mask, scale, causal, offset)
    return backward(problem, mixer(backend), out, lse, with_rows(grad_out))


@banded_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> list[Tensor]:
    tables = [x for x in rest[:4] if isinstance(x, Tensor)]
    gradients = [torch.empty_like(with_rows(x)) for x in (query, key, value)]
    return [*gradients, *(torch.empty_like(x).contiguous() for x in tables)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.causal, ctx.offset, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, mask, out, lse = ctx.saved_tensors
    rest = (ctx.scale, ctx.causal, ctx.offset, ctx.backend)
    found = iter(banded_backward(*tensors, mask, out, lse, grad_out, *rest))
    return (*(None if x is None else next(found) for x in tensors), *[None] * 5)


banded.register_autograd(_gradients, setup_context=_setup)
