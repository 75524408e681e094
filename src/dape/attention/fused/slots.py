"""Where the kernels across heads sum the gradients of tables and weights, and what becomes of it.

A program writes to a slot of its own, along the lines of its tile; `fold` puts the lines of all
together by the distance they stand for, in one order.
"""

from collections.abc import Sequence
from math import prod
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
        self,
        problem: Problem,
        mixing: Mixing,
        mixer: Walker,
        unit: Float[Tensor, ""],
        tables: Sequence[Tensor],
    ) -> None:
        """Fill the gradients of C, U, W1 and W2, times `unit`."""
        static, hidden, weight_in, weight_out = tables
        units, heads = padded(mixing)
        of_hidden, of_static, of_weights, _ = self.sums.split(sizes(mixing, mixer), dim=2)
        place = lowest(problem, mixer.tile_rows, mixer.tile_keys), mixer.tile_keys // mixer.shares
        lines = of_static.unflatten(2, (heads, mixer.lines)).transpose(2, 3)
        fold(problem, lines, *place, unit, static.t())
        fold(problem, of_hidden.unflatten(2, (mixer.lines, units)), *place, unit, hidden)
        add_up(problem, of_weights, (heads, units), unit, weight_in.t(), weight_out)


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


def add_up(
    problem: Problem,
    slots: Float[Tensor, "terms slots size"],
    padded: Sequence[int],
    unit: Float[Tensor, ""],
    table: Float[Tensor, "rows columns"],
    second: Float[Tensor, "rows columns"] | None = None,
    groups: int = 1,
) -> None:
    """Fill a table, times `unit`, from matrices of `padded` sizes, of which each slot has one.

    Of a table of several groups each slot has as many matrices, and then those of a second table.
    """
    entries, (rows, width) = 16, padded
    size = rows * width * groups * (1 if second is None else 2)
    also = table if second is None else second
    kernels.sum_kernel[(cdiv(size, entries),)](
        slots, unit, table, also, slots.shape[0] * slots.shape[1], slots.stride(1),
        len(table) // groups, table.shape[1], groups, *table.stride(), *also.stride(),
        WIDTH=width, ROWS=rows, SECOND=second is not None, SLOTS=128, OUT=entries,
        **problem.gated(), num_warps=4,
    )  # fmt: skip


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


def zeros(like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return zeros of several shapes, in one piece of memory that one operation fills."""
    sizes = [prod(shape) for shape in shapes]
    whole = like.new_zeros(sum(sizes), dtype=torch.float32)
    return [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]
