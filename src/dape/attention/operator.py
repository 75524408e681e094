"""The public operator: arguments checked once, then handed to a backend."""

import math
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dape.attention import sdpa
from dape.attention.chunked import attend_chunked
from dape.attention.reference import attend, log_sum_exp, visibility, widened
from dape.attention.select import fastest, select
from dape.errors import UserError, check_finite, check_switch, check_whole


def attention(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    value: Float[Tensor, "batch kv_heads key value_dim"],
    bias: nn.Module | None = None,
    adapter: nn.Module | None = None,
    causal: bool = True,
    scale: float | None = None,
    query_offset: int | Int[Tensor, ""] = 0,
    backend: str = "auto",
    *,
    mask: Bool[Tensor, "batch key"] | Bool[Tensor, "#batch 1 #query key"] | None = None,
    query_positions: Int[Tensor, "*batch query"] | None = None,
    key_positions: Int[Tensor, "*batch key"] | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
) -> (
    Float[Tensor, "batch heads query value_dim"]
    | tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query key"]]
    | tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]
):
    r"""Attention whose logits are `adapter(q k^T * scale, bias(i, j))`, or their sum without one.

    Args:
        query: `[B, H, Tq, d]`.
        key: `[B, Hkv, Tk, d]`, where Hkv divides H; each serves H / Hkv neighbouring query heads.
        value: `[B, Hkv, Tk, dv]`.
        bias: maps positions to `[H, Tq, Tk]`, such as `dape.Kerple`; none adds nothing.
        adapter: maps scores and bias to logits, such as `dape.DAPE`; any module of that form.
        causal: whether the query in slot i sees only the keys in slots j <= i + query_offset.
        scale: factor of the scores, `1 / sqrt(d)` by default.
        query_offset: slot of the first query among the keys: in decoding, the cached length.
        backend: `auto`, the fastest that serves the call, or `reference`, `chunked`, `sdpa`,
            `triton`, `cuda`; `dape info` says which work here.
        mask: true where a key may be seen: `[B, Tk]` for padding, or `[B or 1, 1, Tq or 1, Tk]`.
        query_positions: `query_offset + arange(Tq)` by default; a batch axis may lead.
        key_positions: `arange(Tk)` by default; a batch axis may lead.
        return_weights: also return the softmax weights (backend `reference`).
        return_lse: also return `lse_i = log sum_j exp(logits_ij)`, `[B, H, Tq]` in float32 (or
            wider where the query is), -inf for a query that sees no key. Outputs over parts of
            the keys merge to that over all: `sum_p exp(lse_p - lse) out_p`, where
            `lse = logsumexp_p lse_p`. Gradients flow through both.

    Returns:
        The output `[B, H, Tq, dv]` in the dtype of the value; zeros for a query that sees no key.

    Raises:
        UserError: for shapes that do not fit each other, and for what the backend cannot do.
    """
    check(query, key, value, bias, adapter)
    check_where(query, key, mask, query_positions, key_positions)
    check_numbers(causal, scale, query_offset)
    rows, keys, device = query.shape[2], key.shape[2], query.device
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    given = query_positions is not None or key_positions is not None

    def obstacle(name: str) -> str | None:
        if name == "sdpa":
            return sdpa.obstacle(
                query, value, bias, adapter, mask, causal, query_offset, return_lse
            )
        if name in ("triton", "cuda"):
            from dape.attention.fused.operator import obstacle

            return obstacle(name, query, value, bias, adapter, mask, query_offset, given)
        return None

    chosen = select(backend, return_weights, return_lse)
    if chosen == "auto":
        chosen = fastest(device, obstacle)
    reason = obstacle(chosen)
    if reason is not None:
        raise UserError(f"backend={chosen!r} cannot serve this call: {reason}; use 'auto'")
    if chosen == "sdpa":
        return sdpa.attend_sdpa(query, key, value, scale, causal, query_offset)
    if chosen in ("triton", "cuda"):
        from dape.attention.fused.operator import attend_fused

        first = cast(int, query_offset)  # what is no number has an obstacle
        out, lse = attend_fused(
            query, key, value, bias, adapter, mask, scale, causal, first, chosen
        )
        return (out, lse) if return_lse else out
    if query_positions is None:
        query_positions = torch.arange(rows, device=device) + query_offset
    if key_positions is None:
        key_positions = torch.arange(keys, device=device)
    dtype = value.dtype
    tensors = widened(query, key, value)
    if chosen == "chunked":
        out, sums = attend_chunked(
            *tensors, query_positions, key_positions, mask, bias, adapter, scale, causal,
            query_offset, return_lse,
        )  # fmt: skip
        return out.to(dtype) if sums is None else (out.to(dtype), sums)
    visible = visibility(rows, keys, mask, causal, query_offset, device)
    out, weights, logits = attend(
        *tensors, query_positions, key_positions, visible, bias, adapter, scale
    )
    if return_lse:
        return out.to(dtype), log_sum_exp(logits, visible)
    return (out.to(dtype), weights.to(dtype)) if return_weights else out.to(dtype)


def check(
    query: Tensor, key: Tensor, value: Tensor, bias: nn.Module | None, adapter: nn.Module | None
) -> None:
    """Raise a `UserError` for tensors and modules that do not fit each other."""
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise UserError(f"{shapes}: each needs four axes [batch, heads, length, head_dim]")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_floating_point():
            raise UserError(
                f"the {name} is {tensor.dtype}; attention takes floating-point numbers, such as "
                f"{name}.float()"
            )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise UserError(f"{shapes}: query and key differ in batch or head_dim")
    if key.shape[:3] != value.shape[:3]:
        raise UserError(f"{shapes}: key and value differ in batch, heads or length")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise UserError(f"{shapes}: the query heads must be a multiple of the key heads")
    if 0 in (*query.shape, *key.shape):
        raise UserError(f"{shapes}: an axis is empty; there must be a query and a key")
    if query.dtype != key.dtype:
        raise UserError(
            f"the query is {query.dtype}, but the key {key.dtype}; give both in one dtype"
        )
    for name, module in (("bias", bias), ("adapter", adapter)):
        for size, axis in (("num_heads", 1), ("head_dim", 3)):
            built = getattr(module, size, query.shape[axis])
            if built != query.shape[axis]:
                raise UserError(f"{name} has {size}={built}, but the query has {query.shape[axis]}")


def check_numbers(causal: bool, scale: float | None, query_offset: int | Tensor) -> None:
    """Raise a `UserError` for numbers that are not finite, or not of their kind."""
    if torch.compiler.is_compiling():
        return
    check_switch(causal=causal)
    if scale is not None:
        check_finite(scale=scale)
    if not isinstance(query_offset, Tensor):
        check_whole(-(2**63), query_offset=query_offset)
    elif query_offset.is_floating_point():
        raise UserError(f"query_offset is {query_offset.dtype}; it must be a whole number")


def check_where(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
) -> None:
    """Raise a `UserError` for a mask or positions that do not fit the queries and keys."""
    batch, _, rows, _ = query.shape
    keys = key.shape[2]
    for name, positions, length in (
        ("query_positions", query_positions, rows),
        ("key_positions", key_positions, keys),
    ):
        if positions is not None and positions.shape[-1] != length:
            raise UserError(f"{name} {list(positions.shape)} must end with length {length}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise UserError(f"mask has dtype {mask.dtype}; it must be torch.bool, true where seen")
    sizes = {2: ((batch,), (keys,)), 4: ((1, batch), (1,), (1, rows), (keys,))}.get(mask.ndim, ())
    if not sizes or any(n not in fit for n, fit in zip(mask.shape, sizes, strict=True)):
        raise UserError(
            f"mask {list(mask.shape)} must be [{batch}, {keys}] or "
            f"[1 or {batch}, 1, 1 or {rows}, {keys}]"
        )
