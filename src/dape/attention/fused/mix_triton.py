"""The kernels across heads in Triton: any GPU, any dtype, and a CPU by the interpreter."""

from typing import Any

from torch import Tensor

from dape.attention.fused import mix_kernels as kernels
from dape.attention.fused.banded import PRECISION
from dape.attention.fused.geometry import Band, Mixing, Problem, diagonals
from dape.attention.fused.slots import Slots, padded

# Tiles of more rows would not fit the registers, nor in float32 shared memory.
tile_rows = 8
tile_keys = 16
lines = 32
shares = 1
# Programs that fill a large GPU a few times over, so that short diagonals even out, and the rows
# of a segment that are worth its start.
PROGRAMS, ROWS = 2048, 256


def share(batch: int, diagonals: int, rows: int) -> tuple[int, int]:
    """Return how many elements a program takes, one, and into how many segments a diagonal is cut.

    The diagonals are those of one element.
    """
    return 1, max(1, min(16, rows // ROWS, PROGRAMS // max(1, batch * diagonals)))


def whole(problem: Problem, mixing: Mixing, *found: Tensor) -> bool:
    """Return that there is no one kernel for everything."""
    return False


def walk(problem: Problem, mixing: Mixing) -> None:
    """Return that there is no one kernel for the backward pass."""


def mix(x: Tensor, band: Band, problem: Problem, mixing: Mixing) -> None:
    """Turn the scores X of a band into logits without C, in place; -inf where unseen."""
    where = diagonals(problem, band, tile_rows, tile_keys)
    mask = x if problem.mask is None else problem.mask[band.batch, band.keys]
    batch, rows, keys = band.sizes
    kernels.mix_kernel[(where.number, batch, share(batch, where.number, rows)[1])](
        x, mixing.weight_in, mixing.weight_out, mixing.hidden, mask,
        rows, keys, mixing.hidden.shape[0],
        where.first, where.band_tile, where.offset, *x.stride()[:2], mask.stride(0),
        **sizes(problem, mixing), **problem.gated(), num_warps=4,
    )  # fmt: skip


def mix_backward(
    x: Tensor,
    y: Tensor,
    band: Band,
    problem: Problem,
    mixing: Mixing,
    lse: Tensor,
    delta: Tensor,
    slots: Slots,
) -> tuple[Tensor, Tensor]:
    """Return P and dA of a band in place of scores X and dP in Y; add to the slots."""
    where = diagonals(problem, band, tile_rows, tile_keys)
    mask = x if problem.mask is None else problem.mask[band.batch, band.keys]
    batch, rows, keys = band.sizes
    kernels.mix_backward_kernel[(where.number, batch, slots.segments)](
        x, y, mixing.weight_in, mixing.weight_out, mixing.hidden, mixing.static,
        lse, delta, mask, slots.sums[:, where.slot :],
        rows, keys, mixing.hidden.shape[0],
        where.first, where.band_tile, where.offset, *slots.sums.shape[1:],
        *x.stride()[:2], *lse.stride(), mask.stride(0), LINES=lines, ADD=slots.add,
        **sizes(problem, mixing), **problem.gated(), num_warps=8, num_stages=1,
    )  # fmt: skip
    return x, y


def sizes(problem: Problem, mixing: Mixing) -> dict[str, Any]:
    """Return the compile-time arguments: counts, padded, and switches."""
    hidden, heads = mixing.weight_in.shape
    units, padded_heads = padded(mixing)
    return {
        "H": heads,
        "D": hidden,
        "HEADS": padded_heads,
        "UNITS": units,
        "M": tile_rows,
        "K": tile_keys,
        "CAUSAL": problem.causal,
        "MASKED": problem.mask is not None,
        "PRECISION": PRECISION,
    }
