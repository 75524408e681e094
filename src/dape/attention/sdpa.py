"""PyTorch's own attention, for calls that add nothing to the scores."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HALF = (torch.float16, torch.bfloat16)
WIDEST_HEAD = 256


def obstacle(
    query: Float[Tensor, "batch heads query head_dim"],
    value: Float[Tensor, "batch kv_heads key value_dim"],
    bias: nn.Module | None,
    adapter: nn.Module | None,
    mask: Bool[Tensor, "#batch 1 #query key"] | None,
    causal: bool,
    query_offset: int | Int[Tensor, ""],
    return_lse: bool,
) -> str | None:
    """Return why PyTorch's attention cannot serve a call in linear memory, or None if it can.

    Its causality begins with the first key at the first query. What its kernels do not take, it
    computes with a whole score matrix.
    """
    head_dim, grouped = query.shape[3], query.shape[1] != value.shape[1]
    on_gpu = query.device.type == "cuda"
    moved = not (isinstance(query_offset, int) and query_offset == 0)
    hiding = causal and not sees_all(query_offset, value.shape[2])
    reasons = [
        (bias is not None or adapter is not None, "it knows neither a bias nor an adapter"),
        (mask is not None, "a mask would keep it from its fast kernels"),
        (hiding and moved, "its causality knows no query_offset"),
        (return_lse, "it returns no log-sum-exp"),
        (query.dtype != value.dtype, f"the query is {query.dtype}, but the value {value.dtype}"),
        (head_dim != value.shape[3], "its kernels want values as wide as queries"),
        (
            on_gpu and (head_dim % 8 != 0 or head_dim > WIDEST_HEAD),
            f"on a GPU head_dim={head_dim} is no multiple of 8 up to {WIDEST_HEAD}",
        ),
        (on_gpu and query.dtype == torch.float64, "it has no kernel for torch.float64 on a GPU"),
        (
            on_gpu and grouped and query.dtype not in HALF,
            f"it has no kernel for grouped heads in {query.dtype} on a GPU",
        ),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def sees_all(query_offset: int | Int[Tensor, ""], keys: int) -> bool:
    """Return whether even the first query sees every key, as in decoding with a cache."""
    return isinstance(query_offset, int) and query_offset >= keys - 1


def attend_sdpa(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    value: Float[Tensor, "batch kv_heads key head_dim"],
    scale: float,
    causal: bool,
    query_offset: int | Int[Tensor, ""],
) -> Float[Tensor, "batch heads query head_dim"]:
    """Return the output of a call that has no `obstacle`."""
    causal = causal and not sees_all(query_offset, key.shape[2])
    # As in every backend, the arguments say the dtype: autocast would take float32 to half.
    with torch.autocast(query.device.type, enabled=False):
        return scaled_dot_product_attention(
            query, key, value,
            is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
