"""PyTorch's own attention, for calls that add nothing to the scores."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def obstacle(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    bias: nn.Module | None,
    adapter: nn.Module | None,
    mask: Bool[Tensor, "#batch 1 #query key"] | None,
    causal: bool,
    query_offset: int | Int[Tensor, ""],
) -> str | None:
    """Return why PyTorch's attention cannot serve a call, or None if it can.

    Its causality begins with the first key at the first query.
    """
    if bias is not None or adapter is not None:
        return "it knows neither a bias nor an adapter"
    if mask is not None:
        return "a mask would keep it from its fast kernels"
    if causal and not (isinstance(query_offset, int) and query_offset == 0):
        return "its causality knows no query_offset"
    return None


def attend_sdpa(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    value: Float[Tensor, "batch kv_heads key value_dim"],
    scale: float,
    causal: bool,
) -> Float[Tensor, "batch heads query value_dim"]:
    """Return the output of a call that has no `obstacle`."""
    # Its kernels for grouped heads are not everywhere; repeated heads are a view for none of them.
    grouped = key.shape[1] != query.shape[1]
    dtype = torch.result_type(query, value)
    return scaled_dot_product_attention(
        query.to(dtype), key.to(dtype), value.to(dtype),
        is_causal=causal, scale=scale, enable_gqa=grouped,
    )  # fmt: skip
