"""PyTorch's own attention, for calls without bias and adapter."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from dape.attention.call import FORWARD_MODE, Attended, Call, transform

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
    on_gpu, half = query.device.type == "cuda", query.dtype in HALF
    if call.bias is not None or call.adapter is not None:
        return "sdpa knows neither a bias nor an adapter"
    if call.mask is not None:
        return "a mask would exclude the fast kernels of sdpa"
    if transform() == FORWARD_MODE:
        return f"the kernels of sdpa know no {FORWARD_MODE}"
    if not call.scale > 0:  # the mask of causality, -inf, is scaled too
        return "the kernels of sdpa want a positive scale"
    moved = not (isinstance(call.shift, int) and call.shift == 0)
    hiding = call.causal and not sees_all(call)
    if hiding and moved and not (ends_together(call) and on_gpu and not grouped and half):
        return "the causality of sdpa knows no query_offset"
    if hiding and moved and torch.compiler.is_compiling():
        return "the causality of sdpa with a query_offset breaks a compiled graph"
    if call.result != value.dtype:
        return f"the output of sdpa is {value.dtype}, as the value"
    if query.dtype != value.dtype:
        return f"the query is {query.dtype}, but the value {value.dtype}"
    if head_dim != value.shape[3]:
        return "the kernels of sdpa want values as wide as queries"
    if on_gpu and (head_dim % 8 != 0 or head_dim > WIDEST_HEAD):
        return f"on a GPU head_dim={head_dim} is no multiple of 8 up to {WIDEST_HEAD}"
    if on_gpu and query.dtype == torch.float64:
        return "sdpa has no kernel for torch.float64 on a GPU"
    if on_gpu and grouped and not half:
        return f"sdpa has no kernel for grouped heads in {query.dtype} on a GPU"
    return None


def sees_all(call: Call) -> bool:
    """Return whether even the first query sees every key, as in decoding with a cache."""
    return isinstance(call.shift, int) and call.shift >= call.key.shape[2] - 1


def ends_together(call: Call) -> bool:
    """Return whether the last query sees the last key, each before a key less, at least one."""
    later = call.key.shape[2] - call.query.shape[2]
    return isinstance(call.shift, int) and call.shift == later > 0


def attend(call: Call, lse: bool = False) -> Attended:
    """Return the output, without a log-sum-exp."""
    rows, keys = call.query.shape[2], call.key.shape[2]
    causal = call.causal and not sees_all(call)
    mask = None
    if causal and call.shift != 0:
        # The import loads PyTorch's compiler, in seconds.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(rows, keys)
    # As in every backend, the arguments say the dtype: autocast would take float32 to half.
    with call.own_dtypes():
        out = scaled_dot_product_attention(
            call.query, call.key, call.value,
            attn_mask=mask, is_causal=causal and mask is None, scale=call.scale,
            enable_gqa=call.query.shape[1] != call.key.shape[1],
        )  # fmt: skip
    return Attended(out)
