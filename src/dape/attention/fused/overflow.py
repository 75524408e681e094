"""Whether numbers leave the range of 16 bits: a flag on the device that kernels set."""

from typing import Any

import torch
from torch import Tensor

from dape.attention.fused import overflow_kernels as kernels
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Problem
from dape.attention.fused.sizes import cdiv, next_power_of_2
from dape.attention.fused.terms import Features, Mixing, Taps

# The largest score, or entry of a table in the scratch, that 16 bits hold well enough. The largest
# log-sum-exp before a backward pass, a measure of the tables at keys of large weight, which
# gradients of weights sum. The largest number between scores and logits.
LARGEST_SCORE, LARGEST_SUM, LARGEST_NUMBER = 64.0, 128.0, 2.0**15


def asking(
    problem: Problem, flag: Tensor | None = None, limit: float | None = None
) -> dict[str, Any]:
    """Return the arguments of a kernel that sets a flag beyond a limit, or obeys a gate."""
    if flag is None or not flag.numel():
        return {**problem.gated(), "LIMIT": None}
    return {"gate": flag, "GATED": -1, "LIMIT": limit}


def largest_sum(learns: bool) -> float:
    """Return the largest log-sum-exp for 16 bits; without gradients of weights every finite one."""
    return LARGEST_SUM if learns else torch.finfo(torch.float32).max


def largest_weight(taps: int = 1) -> float:
    """Return the largest sum of weights that keeps numbers between scores and logits in range."""
    return LARGEST_NUMBER / LARGEST_SCORE / taps**2


def set_flag(flag: Tensor, terms: Mixing, in_scratch: bool) -> None:
    """Set a flag to 1 if weights or tables alone leave the range of 16 bits, else to 0.

    Tables count if they enter the logits and hidden units `in_scratch`.
    """
    units, heads = terms.weight_in.shape
    most = largest_weight(terms.taps if isinstance(terms, Taps) else 1)
    start(kernels.weights_kernel, (1,))(
        flag, terms.weight_in, terms.weight_out, most, H=heads, D=units,
        HEADS=next_power_of_2(heads), UNITS=max(1, next_power_of_2(units)), num_warps=4,
    )  # fmt: skip
    if not in_scratch:
        return
    if isinstance(terms, Features):
        features = len(terms.weight)
        start(kernels.feature_range_kernel, (1,))(
            flag, terms.hidden, terms.static, terms.weight, terms.bias, LARGEST_SCORE,
            H=heads, D=units, F=features, HEADS=next_power_of_2(heads),
            UNITS=max(1, next_power_of_2(units)), FEATURES=next_power_of_2(1 + features),
            num_warps=4,
        )  # fmt: skip
    elif isinstance(terms, Taps):
        sizes = terms.hidden.numel(), terms.static.numel()
        start(kernels.range_kernel, (cdiv(max(sizes), 2048),))(
            flag, terms.hidden, terms.static, *sizes, LARGEST_SCORE, N=2048, num_warps=4
        )
