"""Sizes for kernels. Functions of equal name in Triton cost microseconds a call."""

from typing import NamedTuple

import torch
from torch import Tensor

# Products of float32 are taken in float32, not TF32.
PRECISION = "ieee"
# Products of adapters in the wide way take three parts of TF32, by tensor cores and with about the
# errors of float32. Triton has no such products for AMD.
WIDE_PRECISION = PRECISION if torch.version.hip else "tf32x3"
# No tile has more rows or keys. Lines over rows or keys are padded to multiples.
WIDEST_TILE = 128
# Programs of a kernel of the wide way. Few calls need the wide way. In all others the programs
# return at once, but start one after the other where registers leave room for few at a time.
WIDE_PROGRAMS = 512
# Queries of a step of decoding.
MOST_ROWS = 16


class Tile(NamedTuple):
    """Rows and keys of a program, its warps, and its loads under way."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        """Return the arguments of a kernel with the tile."""
        return {"M": self.rows, "K": self.keys, **self.pace()}

    def pace(self) -> dict[str, int]:
        """Return the arguments of any launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def cdiv(size: int, part: int) -> int:
    """Return how many parts cover a size."""
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    """Return the least power of two from a size on."""
    return 1 << (size - 1).bit_length()


def padded(size: int) -> int:
    """Return a number of heads, units or columns, padded for products."""
    return max(16, next_power_of_2(size))


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of batch, head and row; the last axis is contiguous."""
    return tensor.stride()[:3]
