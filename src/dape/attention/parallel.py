"""A call of attention over parts of its keys, put together by the log-sum-exp of each row.

    lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p - lse) out_p

for the output and log-sum-exp of each part p. Both are differentiable, and so is what they merge
to. A part keeps the indices of its rows and keys, so that a bias and causality know where it lies;
an adapter that looks along the keys sees a few neighbours on each side, the halo.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from dape.attention.call import Attended, Call
from dape.attention.select import select
from dape.errors import UserError


def attend(
    call: Call,
    parts: Sequence[slice],
    lse: bool = False,
    backend: str = "auto",
    wide: bool = True,
) -> Attended:
    """Return the result of a call, computed over parts of its keys one after the other.

    Args:
        call: the whole.
        parts: slices of the keys, each with both ends, which cover each key once.
        lse: whether to return the log-sum-exp.
        backend: as in `dape.attention`, chosen for each part.
        wide: whether outputs of parts are kept in float32 until they are merged. In 16 bits each of
            them would be rounded.

    Raises:
        UserError: for an adapter that looks along whole rows, and as `dape.attention` does.
    """
    seen = [keys for keys in parts if reached(call, keys)] or parts[:1]
    merged = merge([attend_part(part_of(call, keys), backend, wide) for keys in seen])
    return Attended(merged.out.to(call.result), merged.lse if lse else None)


def attend_part(part: Call, backend: str = "auto", wide: bool = True) -> Attended:
    """Return output and log-sum-exp of a part; the output in float32 or wider if `wide`."""
    if wide:
        dtype = torch.promote_types(torch.float32, part.result)
        part = part._replace(out_dtype=dtype)
    return select(part, backend, "lse").attend(part, lse=True)


def part_of(call: Call, keys: slice) -> Call:
    """Return the call over some of the keys, with as many more around them as the adapter sees.

    Those have no weight.
    """
    reach = reach_of(call)
    left = min(reach, keys.start)
    right = min(reach, call.key.shape[2] - keys.stop)
    start, stop = keys.start - left, keys.stop + right
    part = call.part(slice(0, call.query.shape[2]), slice(start, stop))
    if not reach:
        return part
    begun = call.begun
    if call.mask is not None and start > 0:
        shown = call.mask[..., :start].any(-1)
        begun = shown if begun is None else begun | shown
    return part._replace(halo=(left, right), begun=begun)


def reach_of(call: Call) -> int:
    """Return how many keys on each side of its own a logit depends on.

    Raises:
        UserError: for an adapter that does not say.
    """
    adapter = call.adapter
    if not getattr(adapter, "needs_rows", False):
        return 0
    reach = getattr(adapter, "reach", None)
    if reach is None:
        raise UserError(
            f"adapter={type(adapter).__name__} looks along whole rows, so that the keys cannot be "
            "attended to in parts; take dape.attention, or give it a `reach`"
        )
    return int(reach)


def reached(call: Call, keys: slice) -> bool:
    """Return whether a row may see one of the keys: by causality alone, as far as it is known."""
    if not call.causal or not isinstance(call.shift, int):
        return True
    return keys.start < call.shift + call.query.shape[2]


def merge(parts: Sequence[Attended]) -> Attended:
    """Return the result over all keys from those over parts of them, which have a log-sum-exp.

    A row that sees no key of a part has zeros and -inf there.
    """
    if len(parts) == 1:
        return parts[0]
    sums = torch.stack([cast(Tensor, part.lse) for part in parts])
    unseen = (sums == -torch.inf).all(0)
    # The lowest finite number instead of -inf: the gradient of a row that is all -inf is NaN.
    sums = sums.clamp(min=torch.finfo(sums.dtype).min)
    total = sums.logsumexp(0)
    weights = (sums - total).exp()[..., None]
    out = weights[0] * parts[0].out
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        out = out + weight * part.out
    return Attended(out, total.masked_fill(unseen, -torch.inf))
