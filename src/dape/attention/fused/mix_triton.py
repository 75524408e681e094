"""The kernels across heads in Triton: any GPU, any dtype, and a CPU by the interpreter."""

from typing import Any

from torch import Tensor

from dape.attention.fused import kernels
from dape.attention.fused.banded import (
    PRECISION,
    Band,
    Mixing,
    Problem,
    Slots,
    diagonals,
    padded,
    strides,
)

tile_rows = 16
tile_keys = 16


def segments(diagonals: int) -> int:
    """Return 1: diagonals are not cut."""
    return 1


def whole(problem: Problem, mixing: Mixing, exact: bool) -> None:
    """Return None: there is no one kernel for everything."""


def mix(x: Tensor, band: Band, problem: Problem, mixing: Mixing) -> None:
    """Turn the scores X of a band into logits, in place; -inf where unseen."""
    where = diagonals(problem, band, tile_rows, tile_keys)
    mask = x if problem.mask is None else problem.mask[band.batch]
    kernels.mix_kernel[(where.number, band.batch.stop - band.batch.start)](
        x, mixing.weight_in, mixing.weight_out, mixing.hidden, mixing.static, mask,
        band.rows.stop - band.rows.start, band.keys, mixing.hidden.shape[0],
        where.first, where.band_tile, where.offset, *strides(x), mask.stride(0),
        **sizes(problem, mixing), num_warps=4,
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
) -> None:
    """Turn scores X and dP in Y of a band into P and dA, in place; add to the slots."""
    where = diagonals(problem, band, tile_rows, tile_keys)
    mask = x if problem.mask is None else problem.mask[band.batch]
    kernels.mix_backward_kernel[(where.number, band.batch.stop - band.batch.start)](
        x, y, mixing.weight_in, mixing.weight_out, mixing.hidden, mixing.static,
        lse, delta, mask, slots.weight_in, slots.weight_out, slots.hidden, slots.static,
        band.rows.stop - band.rows.start, band.keys, mixing.hidden.shape[0],
        where.first, where.band_tile, where.offset, slots.hidden.shape[2],
        *strides(x), *lse.stride()[:2], mask.stride(0),
        **sizes(problem, mixing), num_warps=8,
    )  # fmt: skip


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
