"""A call of attention over parts of the keys, merged by the log-sum-exp of each row.

    lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p - lse) out_p

for the output and log-sum-exp of every part p. Outputs, log-sum-exps and merged results are
differentiable. A part keeps the indices of rows and keys, for bias and causality. An adapter that
looks along the keys sees a few neighbours on both sides, the halo.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from dape.attention.call import Attended, Call
from dape.attention.reference import fine_log_sum
from dape.attention.select import select
from dape.errors import UserError


def attend(
    call: Call,
    parts: Sequence[slice],
    lse: bool = False,
    backend: str = "auto",
    wide: bool = True,
) -> Attended:
    """Return the result of a call, computed over parts of the keys in turn.

    Args:
        call: the whole.
        parts: slices of the keys with both ends; together the slices cover every key once.
        lse: whether to return the log-sum-exp.
        backend: as in `dape.attention`, chosen by part.
        wide: whether outputs of parts stay in float32 until merged, without rounding to 16 bits.

    Raises:
        UserError: for an adapter that looks along whole rows, and as `dape.attention`.
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
    """Return the call over some of the keys, with the neighbours visible to the adapter.

    Neighbours have no weight.
    """
    reach = reach_of(call)
    left = min(reach, keys.start)
    right = min(reach, call.key.shape[2] - keys.stop)
    start, stop = keys.start - left, keys.stop + right
    part = call.part(slice(0, call.query.shape[2]), slice(start, stop))
    if not reach:
        return part
    mask = None if call.mask is None or start == 0 else call.mask[..., :start]
    return part._replace(halo=(left, right), begun=None if mask is None else mask.any(-1))


def reach_of(call: Call) -> int:
    """Return the number of keys to each side on which a logit depends.

    Raises:
        UserError: for an adapter without `reach`.
    """
    adapter = call.adapter
    if not getattr(adapter, "needs_rows", False):
        return 0
    reach = getattr(adapter, "reach", None)
    if reach is None:
        raise UserError(
            f"adapter={type(adapter).__name__} looks along whole rows, and the keys cannot be "
            "split into parts; take dape.attention, or give the adapter a `reach`"
        )
    return int(reach)


def reached(call: Call, keys: slice) -> bool:
    """Return whether a row may see any of the keys, by causality alone."""
    if not call.causal or not isinstance(call.shift, int):
        return True
    return keys.start < call.shift + call.query.shape[2]


def merge(parts: Sequence[Attended]) -> Attended:
    """Return the result over all keys, merged from results over parts with a log-sum-exp.

    A row without visible keys in a part has zeros and -inf for the part.
    """
    if len(parts) == 1:
        return parts[0]
    sums = torch.stack([cast(Tensor, part.lse) for part in parts])
    unseen = (sums == -torch.inf).all(0)
    # The lowest finite number instead of -inf: the gradient of a row that is all -inf is NaN.
    sums = sums.clamp(min=torch.finfo(sums.dtype).min)
    total = fine_log_sum(sums, 0)
    # Not exp(sums - total): of a total of 1e5, float32 has no digit behind the second, and weights
    # would not sum to one.
    weights = sums.softmax(0)[..., None]
    out = weights[0] * parts[0].out
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        out = out + weight * part.out
    return Attended(out, total.masked_fill(unseen, -torch.inf))
