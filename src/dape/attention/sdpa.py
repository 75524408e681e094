"""PyTorch's own attention, for calls without bias and adapter."""

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from dape.attention.call import Attended, Call

HALF = (torch.float16, torch.bfloat16)
WIDEST_HEAD = 256


def obstacle(call: Call) -> str | None:
    """Return the reason against serving a call in linear memory, or None.

    PyTorch's causality begins with the first key at the first query, or on a GPU in half precision
    ends with the last key at the last query. Outside the kernels, PyTorch computes a whole score
    matrix.
    """
    query, value = call.query, call.value
    head_dim, grouped = query.shape[3], query.shape[1] != value.shape[1]
    on_gpu = query.device.type == "cuda"
    moved = not (isinstance(call.shift, int) and call.shift == 0)
    hiding, half = call.causal and not sees_all(call), query.dtype in HALF
    reasons = [
        (
            call.bias is not None or call.adapter is not None,
            "sdpa knows neither a bias nor an adapter",
        ),
        (call.mask is not None, "a mask would exclude the fast kernels of sdpa"),
        (
            hiding and moved and not (ends_together(call) and on_gpu and not grouped and half),
            "the causality of sdpa knows no query_offset",
        ),
        (call.result != value.dtype, f"the output of sdpa is {value.dtype}, as the value"),
        (query.dtype != value.dtype, f"the query is {query.dtype}, but the value {value.dtype}"),
        (head_dim != value.shape[3], "the kernels of sdpa want values as wide as queries"),
        (
            on_gpu and (head_dim % 8 != 0 or head_dim > WIDEST_HEAD),
            f"on a GPU head_dim={head_dim} is no multiple of 8 up to {WIDEST_HEAD}",
        ),
        (on_gpu and query.dtype == torch.float64, "sdpa has no kernel for torch.float64 on a GPU"),
        (
            on_gpu and grouped and query.dtype not in HALF,
            f"sdpa has no kernel for grouped heads in {query.dtype} on a GPU",
        ),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def sees_all(call: Call) -> bool:
    """Return whether even the first query sees every key, as in decoding with a cache."""
    return isinstance(call.shift, int) and call.shift >= call.key.shape[2] - 1


def ends_together(call: Call) -> bool:
    """Return whether the last query sees the last key, and every earlier query a key less."""
    return isinstance(call.shift, int) and call.shift == call.key.shape[2] - call.query.shape[2]


def attend(call: Call, lse: bool = False) -> Attended:
    """Return the output, without a log-sum-exp."""
    rows, keys = call.query.shape[2], call.key.shape[2]
    causal = call.causal and not sees_all(call)
    mask = causal_lower_right(rows, keys) if causal and call.shift != 0 else None
    # As in every backend, the arguments say the dtype: autocast would take float32 to half.
    with torch.autocast(call.query.device.type, enabled=False):
        out = scaled_dot_product_attention(
            call.query, call.key, call.value,
            attn_mask=mask, is_causal=causal and mask is None, scale=call.scale,
            enable_gqa=call.query.shape[1] != call.key.shape[1],
        )  # fmt: skip
    return Attended(out)
