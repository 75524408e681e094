"""The textbook: whole score matrices in plain PyTorch, what every other backend must equal."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dape.positions.adapter import Rows


def widened(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    value: Float[Tensor, "batch kv_heads key value_dim"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors in float32, or in float64 if one of them is.

    A product of 16-bit numbers is exact in float32, and in TF32 too, which holds their 11 bits. On
    a GPU it takes no longer than a product in 16 bits and the pass that widens the result.
    """
    dtype = torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def visibility(
    rows: int,
    keys: int,
    mask: Bool[Tensor, "#batch 1 #query key"] | None,
    causal: bool,
    query_offset: int | Int[Tensor, ""],
    device: torch.device,
) -> Bool[Tensor, "#batch 1 query key"]:
    """Return which key each query may see: `j <= i + query_offset` if causal, and the mask."""
    visible = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=device)
    if causal:
        slots = torch.arange(rows, device=device) + query_offset
        visible = (torch.arange(keys, device=device) <= slots[:, None])[None, None]
    return visible if mask is None else visible & mask


class Attended(NamedTuple):
    """What `attend` returns: the output, the weights, and the logits, lowest where unseen."""

    out: Float[Tensor, "batch heads query value_dim"]
    weights: Float[Tensor, "batch heads query key"]
    logits: Float[Tensor, "batch heads query key"]


def attend(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    value: Float[Tensor, "batch kv_heads key value_dim"],
    query_positions: Int[Tensor, "*batch query"],
    key_positions: Int[Tensor, "*batch key"],
    visible: Bool[Tensor, "#batch 1 query key"],
    bias: nn.Module | None,
    adapter: nn.Module | None,
    scale: float,
) -> Attended:
    """Return output, attention weights and logits; a query that sees no key gets zeros.

    All is computed in the dtype of the arguments, as `widened`. Grouped key-value heads are never
    repeated in memory.
    """
    heads, rows, kv_heads, keys = *query.shape[1:3], *key.shape[1:3]
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.unflatten(1, (kv_heads, -1))
        scores = torch.einsum("bkgqd,bkjd->bkgqj", grouped, key).flatten(1, 2) * scale
        logits = scores
        if bias is not None or adapter is not None:
            shift = scores.new_zeros(()).expand(heads, rows, keys)
            if bias is not None:
                shift = bias(query_positions, key_positions).to(scores.dtype)
            if adapter is None:
                logits = scores + shift
            elif getattr(adapter, "needs_rows", False):
                block = Rows(query, key, query_positions, key_positions, visible, scale)
                logits = adapter(scores, shift, block)
            else:
                logits = adapter(scores, shift)
        # The lowest finite number, not -inf: the gradient of a row that is all -inf is NaN.
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1).masked_fill(~visible, 0)
        grouped = weights.unflatten(1, (kv_heads, -1))
        out = torch.einsum("bkgqj,bkjd->bkgqd", grouped, value).flatten(1, 2)
    return Attended(out, weights, logits)


def log_sum_exp(
    logits: Float[Tensor, "batch heads query key"], visible: Bool[Tensor, "#batch 1 query key"]
) -> Float[Tensor, "batch heads query"]:
    """Return `log sum_j exp(logits_ij)` over the visible keys; -inf for a query that sees none."""
    return logits.logsumexp(-1).masked_fill(~visible.any(-1), -torch.inf)
