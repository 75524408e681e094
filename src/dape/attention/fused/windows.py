"""The problems of DAPE V2 that the kernels in CUDA serve, by windows of keys."""

from functools import cache

import torch

from dape.attention.fused.problem import Problem
from dape.attention.fused.terms import Taps
from dape.attention.fused.tiles import BLOCK

# Taps, most heads and units, and the rows of a tile.
TAPS, HEADS, MOST_UNITS, ROWS = 3, 16, 32, 8
# Capabilities with 227 KiB of shared memory for a block: H100, B200 and B300.
LARGE = ((9, 0), (10, 0), (10, 3))


def serves(problem: Problem, terms: Taps) -> bool:
    """Return whether the kernels serve a problem: a causal one without a mask, of enough rows."""
    heads, rows, keys = problem.query.shape[1], problem.query.shape[2], problem.key.shape[2]
    units = len(terms.hidden_bias)
    return (
        problem.causal
        and problem.mask is None
        and problem.scratch == torch.float16
        and problem.halo == (0, 0)
        and terms.taps == TAPS
        and heads <= HEADS
        and units <= MOST_UNITS
        and rows >= ROWS
        and 0 <= problem.offset <= keys - rows
        and heads * keys * BLOCK.value < 2**31  # the least band, in offsets of 32 bits
        and has_room()
    )


def has_room() -> bool:
    """Return whether a block of the current GPU may have the shared memory of the backward pass."""
    return torch.cuda.is_available() and _has_room(torch.cuda.current_device())


@cache
def _has_room(device: int) -> bool:
    return torch.cuda.get_device_capability(device) in LARGE
