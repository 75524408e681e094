"""The banded kernels as registered operators, and which calls they serve."""

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dape.attention.fused.tables import hidden_units, tables
from dape.attention.fused.tables import obstacle as table_obstacle
from dape.positions.bias import FIRE

if TYPE_CHECKING:
    from dape.attention.fused.geometry import Problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD, MOST_HEADS, MOST_UNITS = 128, 32, 64
# Taps of a convolution times heads or units, all padded; half as many in float32.
MOST_CHANNELS = 256
# CUDA's limit of a grid along its second axis, on which stand the heads of a batch.
MOST_PROGRAMS = 65535
# Capabilities with more than 160 KiB of shared memory for a block: A100, H100, B200 and B300.
LARGE = ((8, 0), (9, 0), (10, 0), (10, 3))


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
    batch, heads, units = *query.shape[:2], hidden_units(adapter)
    taps = getattr(adapter, "kernel_size", 1)
    channels = (1 << (taps - 1).bit_length()) * (1 << (max(16, heads, units) - 1).bit_length())
    most_channels = MOST_CHANNELS // (2 if query.dtype == torch.float32 else 1)
    features = len(bias.bias_in) if isinstance(bias, FIRE) else 0
    most, widest = max(units, features), max(query.shape[3], value.shape[3])
    reasons = [
        (positions_given, "positions are given, and the kernels count slots"),
        (not isinstance(query_offset, int), "query_offset is a tensor"),
        (mask is not None and mask.shape[2] > 1, "the mask differs between queries"),
        (query.dtype not in DTYPES, f"the dtype is {query.dtype}"),
        (query.dtype != value.dtype, f"the query is {query.dtype}, but the value {value.dtype}"),
        (widest > WIDEST_HEAD, f"head_dim={widest} is more than {WIDEST_HEAD}"),
        (heads > MOST_HEADS, f"{heads} heads are more than {MOST_HEADS}"),
        (batch * heads > MOST_PROGRAMS, f"batch * heads is more than {MOST_PROGRAMS}"),
        (most > MOST_UNITS, f"hidden={most} is more than {MOST_UNITS}"),
        (
            taps > 1 and channels > most_channels,
            f"kernel_size={taps} with {heads} heads and hidden={units} needs {channels} padded "
            f"channels, more than {most_channels}",
        ),
        (
            heads > 16 and units > 32 and is_small(query.device),
            f"{heads} heads and hidden={units} need more shared memory than it has",
        ),
    ]
    found = next((reason for holds, reason in reasons if holds), None)
    found = found or table_obstacle(bias, adapter)
    if found is None and backend == "cuda" and adapter is not None and not features and taps == 1:
        from dape.attention.fused import mix_cuda

        if query.dtype == torch.float32:
            return "its scratch is fp16, too narrow for float32"
        return mix_cuda.obstacle(heads, units)
    return found


def is_small(device: torch.device) -> bool:
    """Return whether a GPU has less shared memory than the widest float32 tiles take, 132 KiB."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) not in LARGE


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
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
    """Return output and log-sum-exp of a call that has no `obstacle`."""
    rows, keys = query.shape[2], key.shape[2]
    count = max(keys - min(0, query_offset), rows + query_offset)
    found = tables(bias, adapter, query.shape[1], count, query.device)
    seen = None if mask is None else mask[:, 0, 0].expand(query.shape[0], keys).contiguous()
    exact = torch.is_grad_enabled() and any(table.requires_grad for table in found)
    out, lse, *_ = banded(
        query, key, value, found, seen, scale, causal, query_offset, backend, exact
    )
    return out, lse


def mixer(backend: str, problem: "Problem") -> ModuleType:
    """Return the kernels across heads of a backend; FIRE's and DAPE V2's are in Triton for both."""
    from dape.attention.fused import mix_convolution, mix_cuda, mix_fire, mix_triton

    if problem.features is not None:
        return mix_fire
    if problem.hidden_bias is not None:
        return mix_convolution
    return mix_cuda if backend == "cuda" else mix_triton


def with_rows(x: Tensor) -> Tensor:
    """Return `x` with a contiguous last axis, as the kernels read it."""
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
) -> "Problem":
    """Return the problem of an operator's arguments, with contiguous rows.

    Of the tables there are none, C, those of `Mixing`, or those and b1, or those of `Features`.
    """
    from dape.attention.fused.geometry import Features, Mixing, Problem

    given = [table.contiguous() for table in tables]
    mixed = len(Mixing._fields)
    return Problem(
        query=with_rows(query),
        key=with_rows(key),
        value=with_rows(value),
        static=given[0] if given else None,
        mixing=Mixing(*given[:mixed]) if len(given) >= mixed else None,
        features=Features(*given[mixed:]) if len(given) > mixed + 1 else None,
        hidden_bias=given[mixed] if len(given) == mixed + 1 else None,
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
    tables: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    causal: bool,
    offset: int,
    backend: str,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp, if `exact` what rounding left of the output, and a flag.

    They are those of `banded.forward`, the other arguments those of `Problem`.
    """
    from dape.attention.fused.banded import forward

    problem = problem_of(query, key, value, tables, mask, scale, causal, offset)
    with torch.cuda.device_of(query):
        return forward(problem, mixer(backend, problem), exact)


@banded.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, tables: Sequence[Tensor], *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    narrow = len(tables) > 1 and query.dtype != torch.float32
    rest = torch.empty_like(out) if narrow and others[-1] else query.new_empty(0)
    return out, lse, rest, query.new_empty(int(narrow), dtype=torch.int32)


@torch.library.custom_op("dape::banded_backward", mutates_args=())
def banded_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    flag: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    causal: bool,
    offset: int,
    backend: str,
) -> list[Tensor]:
    """Return the gradients of query, key, value and the tables."""
    from dape.attention.fused.banded import backward

    problem = problem_of(query, key, value, tables, mask, scale, causal, offset)
    if grad_lse is not None:  # a row that sees nothing has none
        grad_lse = grad_lse.contiguous().masked_fill(lse == -torch.inf, 0)
    with torch.cuda.device_of(query):
        mixers = mixer(backend, problem), mixer("triton", problem)
        return backward(problem, *mixers, out, lse, rest, flag, with_rows(grad_out), grad_lse)


@banded_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, tables: Sequence[Tensor], *rest: object
) -> list[Tensor]:
    gradients = [torch.empty_like(with_rows(x)) for x in (query, key, value)]
    return [*gradients, *(torch.empty_like(x).contiguous() for x in tables)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, tables, mask, *ctx.how, _exact = inputs
    ctx.save_for_backward(query, key, value, mask, *output, *tables)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_others: None
) -> tuple[Any, ...]:
    query, key, value, mask, out, lse, rest, flag, *tables = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    found = banded_backward(
        query, key, value, tables, mask, out, lse, rest, flag, grad_out, grad_lse, *ctx.how
    )
    return *found[:3], found[3:], *[None] * 6


banded.register_autograd(_gradients, setup_context=_setup)
