"""Partial sums of programs, a slot for every program, added in a fixed order."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused import sums_kernels as kernels
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Problem
from dape.attention.fused.sizes import cdiv, next_power_of_2

# Numbers that a program clears, or reads at a time from all slots.
ENTRIES = 4096
# Numbers that a program of `fold` reads at a time, most distances of a program, and programs that
# fill a GPU.
LOADS, MOST_DISTANCES, PROGRAMS = 1024, 128, 512


def add_up(
    problem: Problem,
    slots: Float[Tensor, "terms slots size"],
    padded: Sequence[int],
    unit: Float[Tensor, ""],
    table: Float[Tensor, "rows columns"],
    second: Float[Tensor, "rows columns"] | None = None,
) -> None:
    """Fill a table, times `unit`, from matrices of `padded` sizes, a matrix in every slot.

    The matrix of a second table follows in the slot.
    """
    count, (rows, width) = slots.shape[0] * slots.shape[1], padded
    size = rows * width * (1 if second is None else 2)
    also, (at_once, entries) = table if second is None else second, slots_at_once(count)
    start(kernels.sum_kernel, (cdiv(size, entries),))(
        slots, unit, table, also, count, slots.stride(1),
        *table.shape, *table.stride(), *also.stride(),
        WIDTH=width, ROWS=rows, SECOND=second is not None, SLOTS=at_once, OUT=entries,
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
    """Fill a table over the distance, times `unit`, from the sums of the lines of every slot.

    Line r of slot q is the distance i - j = first + q step + r. Lines of neighbouring slots
    overlap. Negative distances fold onto positive distances, since |i - j| counts. If `skewed`,
    term m of line r is column r - m of row m of a tile step x step, and 0 outside the tile.
    """
    terms, slots, reach, _ = lines.shape
    count, columns = table.shape
    # Neighbours in memory, columns or lines, are read together.
    width = next_power_of_2(columns) if lines.stride(3) == 1 else 1
    distances, at_once = distances_at_once(terms, count, columns, width)
    start(kernels.fold_kernel, (cdiv(count, distances), cdiv(columns, width)))(
        lines, unit, table, terms, slots, reach, first, step, count, columns,
        *lines.stride(), *table.stride(),
        SPANS=cdiv(reach, step), SKEWED=skewed, DISTANCES=distances, COLUMNS=width,
        TERMS=at_once, **problem.gated(), num_warps=4,
    )  # fmt: skip


def slots_at_once(count: int) -> tuple[int, int]:
    """Return how many of some slots a program reads at a time, and how many numbers of a slot."""
    slots = 16 if count <= 16 else 512
    return slots, ENTRIES // slots


def distances_at_once(terms: int, count: int, columns: int, width: int) -> tuple[int, int]:
    """Return of how many distances, by `width` columns, and terms a program reads at a time."""
    distances = max(4, 32 // width)
    programs = cdiv(count, distances) * cdiv(columns, width)
    distances = min(MOST_DISTANCES, distances * next_power_of_2(max(1, programs // PROGRAMS)))
    return distances, max(1, min(next_power_of_2(terms), LOADS // (distances * width)))


def zeros(like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return zeros of several shapes, in a common buffer that a single kernel fills."""
    sizes = [prod(shape) for shape in shapes]
    whole = cleared(like.new_empty(sum(sizes), dtype=torch.float32))
    return [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]


def cleared(x: Tensor, problem: Problem | None = None) -> Tensor:
    """Return a tensor without gaps in memory, filled with zeros if the gate of a problem agrees."""
    size, gated = x.numel(), {"gate": x, "GATED": -1} if problem is None else problem.gated()
    start(kernels.zero_kernel, (cdiv(size, ENTRIES),))(x, size, N=ENTRIES, **gated, num_warps=4)
    return x
