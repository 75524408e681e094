"""Where the kernels across heads sum the gradients of tables and weights, and what becomes of it.

A program writes to a slot of its own, along the lines of its tile; `fold` puts the lines of all
together by the distance they stand for, in one order.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused import mix_kernels as kernels
from dape.attention.fused.banded import Mixer
from dape.attention.fused.geometry import (
    Mixing,
    Problem,
    blocks,
    cdiv,
    diagonals,
    lowest_diagonal,
    next_power_of_2,
)


@runtime_checkable
class Walker(Mixer, Protocol):
    """A mixer whose programs walk along diagonals of tiles of one size.

    Gradients are summed along the `lines` of a tile, or of each of its `shares` if several programs
    have some of its rows each.
    """

    tile_rows: int
    tile_keys: int
    lines: int
    shares: int

    def share(self, batch: int, diagonals: int, rows: int) -> tuple[int, int]:
        """Return how many elements a program takes, and into how many segments to cut diagonals."""


class Slots(NamedTuple):
    """Where each share of each diagonal sums its gradients, for some elements and a segment of it.

    A slot holds U `[lines, UNITS]`, C `[HEADS, lines]`, W1 `[HEADS, UNITS]` and W2 likewise. If
    several bands `add` to it, it is zero at first, else what is written counts.
    """

    sums: Float[Tensor, "terms slots size"]
    elements: int
    segments: int
    add: bool

    @classmethod
    def of(cls, problem: Problem, mixing: Mixing, mixer: Walker) -> "Slots":
        """Return room for the bands of a problem."""
        group, count = slots_of(problem, mixer)
        all_bands = blocks(problem)
        rows = max(band.sizes[1] for band in all_bands)
        elements, segments = mixer.share(group, count, rows)
        shape = cdiv(group, elements) * segments, count * mixer.shares, sum(sizes(mixing, mixer))
        add = len(all_bands) > 1
        make = problem.query.new_zeros if add else problem.query.new_empty
        return cls(make(shape, dtype=torch.float32), elements, segments, add)

    def gradients(
        self, problem: Problem, mixing: Mixing, mixer: Walker, unit: Float[Tensor, ""]
    ) -> list[Tensor]:
        """Return the gradients of C, U, W1 and W2, times `unit`."""
        (hidden_units, heads), (units, padded_heads) = mixing.weight_in.shape, padded(mixing)
        sums = self.sums.sum(0) if len(self.sums) > 1 else self.sums[0]
        hidden_sums, static_sums, *weight_sums = sums.split(sizes(mixing, mixer), dim=1)
        weight_in, weight_out = (
            weight.sum(0).view(padded_heads, units)[:heads, :hidden_units] * unit
            for weight in weight_sums
        )
        place = lowest(problem, mixer.tile_rows, mixer.tile_keys), mixer.tile_keys // mixer.shares
        static, hidden = torch.empty_like(mixing.static), torch.empty_like(mixing.hidden)
        lines = static_sums.unflatten(1, (padded_heads, mixer.lines)).transpose(1, 2)
        fold(problem, lines[None], *place, unit, static.t())
        lines = hidden_sums.unflatten(1, (mixer.lines, units))
        fold(problem, lines[None], *place, unit, hidden)
        return [static, hidden, weight_in.t().contiguous(), weight_out]


def sizes(mixing: Mixing, mixer: Walker) -> list[int]:
    """Return how many numbers a slot holds of U, C, W1 and W2."""
    units, heads = padded(mixing)
    return [mixer.lines * units, mixer.lines * heads, heads * units, heads * units]


def slots_of(problem: Problem, mixer: Walker) -> tuple[int, int]:
    """Return the elements of a group, and how many diagonals they have in all bands together."""
    all_bands = blocks(problem)
    found = [diagonals(problem, x, mixer.tile_rows, mixer.tile_keys) for x in all_bands]
    return all_bands[0].batch.stop, max(where.slot + where.number for where in found)


def padded(mixing: Mixing) -> tuple[int, int]:
    """Return hidden units and heads as the mixers pad them."""
    units, heads = mixing.weight_in.shape
    return padded_size(units), padded_size(heads)


def padded_size(count: int) -> int:
    """Return a number of heads or hidden units as products take it."""
    return max(16, next_power_of_2(count))


def lowest(problem: Problem, tile_rows: int, tile_keys: int, reach: int = 0) -> int:
    """Return the distance i + reach - j of the first line of the first slot of a problem."""
    first = lowest_diagonal(problem, tile_rows, tile_keys, reach)
    return first * tile_keys + (problem.offset + reach) % tile_keys - (tile_keys - 1)


def fold(
    problem: Problem,
    lines: Float[Tensor, "terms slots lines COLUMNS"],
    first: int,
    step: int,
    unit: Float[Tensor, ""],
    table: Float[Tensor, "distances columns"],
    skewed: bool = False,
) -> None:
    """Fill a table over the distance, times `unit`, from the sums of the lines of each slot.

    Line r of slot q is the distance i - j = first + q step + r: the lines of neighbouring slots
    overlap, and negative ones fold onto positive ones, since |i - j| is what counts. If `skewed`,
    term m of line r is column r - m of row m of a tile step x step, nothing where it has none.
    """
    terms, slots, reach, _ = lines.shape
    count, columns = table.shape
    # What lies side by side, columns or lines, is read so.
    distances, width = (4, next_power_of_2(columns)) if lines.stride(3) == 1 else (32, 1)
    kernels.fold_kernel[(cdiv(count, distances), cdiv(columns, width))](
        lines, unit, table, terms, slots, reach, first, step, count, columns,
        *lines.stride(), *table.stride(),
        SPANS=cdiv(reach, step), SKEWED=skewed, DISTANCES=distances, COLUMNS=width,
        TERMS=min(next_power_of_2(terms), 2048 // (distances * width)), **problem.gated(),
        num_warps=4,
    )  # fmt: skip
