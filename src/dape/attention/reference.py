"""The textbook: whole score matrices in plain PyTorch, the truth for tests of all backends."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dape.attention.call import Attended, Call
from dape.errors import UserError
from dape.positions.adapter import Rows, adapted
from dape.positions.given import fits

# The first release of PyTorch that exports products over free sizes of batch and length.
EXPORTS = (2, 13)


def obstacle(call: Call) -> str | None:
    """Return None, because reference serves every call."""


def attend(call: Call, lse: bool = False) -> Attended:
    """Return output, weights, and with `lse` the log-sum-exp; zeros without visible keys.

    The computation is in float32, or in float64 with a float64 tensor. Grouped key-value heads are
    never repeated.

    Raises:
        UserError: for a free length in `torch.export` before PyTorch 2.13.
    """
    if torch.compiler.is_exporting():
        check_exportable(call)
    dtype, call = call.result, call.widened()
    visible = call.visible()
    with call.own_dtypes():
        logits, counted = logits_of(call, visible), within_halo(call, visible)
        if call.masks:
            # The lowest finite number, not -inf: the gradient of a row that is all -inf is NaN.
            logits = logits.masked_fill(~counted, torch.finfo(logits.dtype).min)
            weights = logits.softmax(-1).masked_fill(~counted, 0)
        else:
            weights = logits.softmax(-1)
        grouped = weights.unflatten(1, (call.value.shape[1], -1))
        out = torch.einsum("bkgqj,bkjd->bkgqd", grouped, call.value).flatten(1, 2)
    sums = log_sum_exp(logits, counted) if lse else None
    return Attended(out.to(dtype), sums, weights.to(dtype))


def check_exportable(call: Call) -> None:
    """Refuse a free length in an export by a PyTorch that cannot export the products.

    Raises:
        UserError: for such a length.
    """
    if isinstance(call.query.shape[2], torch.SymInt) and torch.__version__ < EXPORTS:
        raise UserError(
            "torch.export with a free length needs PyTorch 2.13 or later for a bias or an adapter,"
            f" and this is {torch.__version__}; export a fixed length"
        )


def logits_of(
    call: Call, visible: Bool[Tensor, "#batch 1 query key"]
) -> Float[Tensor, "batch heads query key"]:
    """Return the logits of a widened call, arbitrary for invisible keys."""
    query, key, bias, adapter = call.query, call.key, call.bias, call.adapter
    # The scale is taken to the queries, which are fewer than scores.
    grouped = (query * call.scale).unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("bkgqd,bkjd->bkgqj", grouped, key).flatten(1, 2)
    if bias is None and adapter is None:
        return scores
    positions = call.positions()
    shift = scores.new_zeros(()).expand(scores.shape[1:])
    if bias is not None:
        shift = bias(*positions)
        check_bias(bias, shift, scores)
        shift = shift.to(scores.dtype)
    rows = Rows(query, key, *positions, visible, call.scale, call.begun)
    return adapted(adapter, scores, shift, rows)


def check_bias(
    bias: Callable[..., Tensor], found: object, scores: Float[Tensor, "batch heads query key"]
) -> None:
    """Refuse a result of a bias without axes for heads, queries and keys.

    Raises:
        UserError: for such a result.
    """
    batch, heads, rows, keys = scores.shape
    each = (heads, 1), (rows, 1), (keys, 1)
    if not isinstance(found, Tensor) or not fits(found, each, ((batch, 1), *each)):
        shape = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise UserError(
            f"the bias {type(bias).__name__} returned {shape}; it must return "
            f"[heads, queries, keys] = [{heads}, {rows}, {keys}], with or without a batch before"
        )


def within_halo(
    call: Call, visible: Bool[Tensor, "#batch 1 query key"]
) -> Bool[Tensor, "#batch 1 query key"]:
    """Return the visible keys with a weight, all outside the halo."""
    if call.halo == (0, 0):
        return visible
    places = torch.arange(visible.shape[3], device=visible.device)
    return visible & (places >= call.halo[0]) & (places < len(places) - call.halo[1])


def log_sum_exp(
    logits: Float[Tensor, "batch heads query key"], visible: Bool[Tensor, "#batch 1 query key"]
) -> Float[Tensor, "batch heads query"]:
    """Return `log sum_j exp(logits_ij)` over the visible keys; -inf without visible keys."""
    return fine_log_sum(logits, -1).masked_fill(~visible.any(-1), -torch.inf)


def fine_log_sum(logits: Tensor, dim: int) -> Tensor:
    """Return the log-sum-exp along an axis, with a gradient that sums to that of the result.

    The gradient of `logsumexp` is exp(logits - result). float32 holds a result of 1e5 to 0.008, and
    the gradient would sum to as much too little or too much.
    """
    top = logits.detach().amax(dim, keepdim=True)
    return (logits - top).logsumexp(dim) + top.squeeze(dim)
