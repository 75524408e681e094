"""Where the kernels across heads sum the gradients of tables and weights, and what becomes of it.

A program adds to a slot of its own, along the lines of its tile; `fold` puts the lines of all
together by the distance they stand for, in one order.
"""

from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from triton import cdiv, next_power_of_2

from dape.attention.fused import kernels
from dape.attention.fused.banded import Mixer
from dape.attention.fused.geometry import Diagonals, Mixing, Problem, bands, diagonals


class Slots(NamedTuple):
    """Where each segment of each diagonal of each element of a group sums its gradients.

    If several bands `add` to them they are zero at first, else what the first writes counts.
    """

    weight_in: Float[Tensor, "group segments slots UNITS HEADS"]
    weight_out: Float[Tensor, "group segments slots HEADS UNITS"]
    hidden: Float[Tensor, "group segments slots lines UNITS"]
    static: Float[Tensor, "group segments slots lines HEADS"]
    add: bool

    @classmethod
    def of(cls, problem: Problem, mixing: Mixing, mixer: Mixer) -> "Slots":
        """Return room for the bands of a problem."""
        group, count = slots_of(problem, mixer)
        units, heads = padded(mixing)
        all_bands = bands(problem)
        rows = max(band.rows.stop - band.rows.start for band in all_bands)
        segments, add = mixer.segments(group * count, rows), len(all_bands) > 1
        shapes = (units, heads), (heads, units), (mixer.lines, units), (mixer.lines, heads)
        sizes = [group * segments * count * prod(shape) for shape in shapes]
        buffer = problem.query.new_empty(sum(sizes), dtype=torch.float32)
        if add:
            buffer.zero_()
        weight_in, weight_out, hidden, static = (
            part.view(group, segments, count, *shape)
            for part, shape in zip(buffer.split(sizes), shapes, strict=True)
        )
        return cls(weight_in, weight_out, hidden, static, add)

    def gradients(
        self, problem: Problem, mixing: Mixing, mixer: Mixer, unit: Float[Tensor, ""]
    ) -> list[Tensor]:
        """Return the gradients of C, U, W1 and W2, times `unit`."""
        where = diagonals(problem, bands(problem)[0], mixer.tile_rows, mixer.tile_keys)
        units, heads = mixing.weight_in.shape
        weight_in = self.weight_in.sum((0, 1, 2))[:units, :heads] * unit
        weight_out = self.weight_out.sum((0, 1, 2))[:heads, :units] * unit
        static, hidden = torch.empty_like(mixing.static), torch.empty_like(mixing.hidden)
        fold(self.static.flatten(0, 1), where, mixer.tile_keys, unit, static.t())
        fold(self.hidden.flatten(0, 1), where, mixer.tile_keys, unit, hidden)
        return [static, hidden, weight_in, weight_out]


def slots_of(problem: Problem, mixer: Mixer) -> tuple[int, int]:
    """Return the elements of a group, and how many diagonals each may have in a band."""
    all_bands = bands(problem)
    numbers = (diagonals(problem, x, mixer.tile_rows, mixer.tile_keys).number for x in all_bands)
    return all_bands[0].batch.stop, max(numbers)


def padded(mixing: Mixing) -> tuple[int, int]:
    """Return hidden units and heads as the mixers pad them."""
    units, heads = mixing.weight_in.shape
    return max(16, next_power_of_2(units)), max(16, next_power_of_2(heads))


def fold(
    lines: Float[Tensor, "terms slots lines COLUMNS"],
    where: Diagonals,
    tile_keys: int,
    unit: Float[Tensor, ""],
    table: Float[Tensor, "distances columns"],
    skewed: bool = False,
) -> None:
    """Fill a table over the distance, times `unit`, from the sums of the lines of each diagonal.

    Line r of diagonal q is i - j = q K + offset + r - (K - 1): the lines of neighbouring diagonals
    overlap, and negative ones fold onto positive ones, since |i - j| is what counts. If `skewed`,
    term m of line r is column r - m of row m of a tile K x K, nothing where it has none.
    """
    terms, slots, reach, _ = lines.shape
    count, columns = table.shape
    # What lies side by side, columns or lines, is read so.
    distances, width = (4, next_power_of_2(columns)) if lines.stride(3) == 1 else (32, 1)
    kernels.fold_kernel[(cdiv(count, distances), cdiv(columns, width))](
        lines, unit, table, terms, slots, reach,
        where.first * tile_keys + where.offset - (tile_keys - 1), tile_keys, count, columns,
        *lines.stride(), *table.stride(),
        SPANS=cdiv(reach, tile_keys), SKEWED=skewed, DISTANCES=distances, COLUMNS=width,
        TERMS=min(next_power_of_2(terms), 2048 // (distances * width)), num_warps=4,
    )  # fmt: skip
