"""The bands of a problem, the scratch for a band, and the diagonals of tiles."""

from functools import lru_cache
from math import isqrt, prod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused import windows
from dape.attention.fused.problem import Band, Problem
from dape.attention.fused.sizes import cdiv
from dape.attention.fused.terms import Nothing, Static, Taps
from dape.attention.fused.tiles import BLOCK

# Scores of two bytes in the scratch at a time; half as many of four bytes.
SCORES_PER_BAND = 2**28
# Keys to a row of a band with cuts between keys.
ASPECT = 4
# Bands start, and keys of the scratch are padded, at multiples, for whole tiles of every mixer.
ALIGNMENT = BLOCK.value


class Extent(NamedTuple):
    """The sizes of a problem that decide the bands.

    `numbers` counts the numbers for a query and a key in either of two scratches, a number for
    every head. DAPE V2 has four scratches: scores, dP, P, and dA or, in Triton, hidden units.
    Without mixing `numbers` is None, since a scratch is not needed.
    """

    batch: int
    rows: int
    keys: int
    offset: int
    causal: bool
    numbers: int | None

    @classmethod
    def of(cls, problem: Problem) -> "Extent":
        """Return the extent of a problem."""
        batch, heads, rows, _ = problem.query.shape
        numbers = None if isinstance(problem.terms, Nothing | Static) else heads
        if isinstance(problem.terms, Taps):
            numbers = 2 * heads
            if not windows.serves(problem, problem.terms):
                numbers = cdiv(3 * heads + len(problem.terms.hidden_bias), 2)
        return cls(batch, rows, problem.key.shape[2], problem.offset, problem.causal, numbers)

    def visible(self, rows: int) -> int:
        """Return how many keys the first `rows` queries see together, at least 1 if any."""
        visible = max(1, self.offset + rows) if self.causal else self.keys
        return min(self.keys, visible) if rows else 0


def bands(problem: Problem) -> tuple[Band, ...]:
    """Return the bands of a problem: the whole, unless a scratch limits the size.

    Rows that see fewer keys come in higher bands, for bands of about equal size.
    """
    return bands_of(Extent.of(problem), room(problem), False)


def blocks(problem: Problem) -> tuple[Band, ...]:
    """Return the bands of a problem, with cuts between keys for wide and low bands.

    The backward pass adds every band to dQ by row, to dK and dV by key, and to tables by distance.
    With cuts the additions stay few beside the scores, however long the sequence. Convolutions
    along the keys need whole rows, and so does `balance` in float32.
    """
    cut = not isinstance(problem.terms, Taps) and problem.scratch == torch.float16
    return bands_of(Extent.of(problem), room(problem), cut)


def room(problem: Problem) -> int:
    """Return how many scores the scratch of a problem may hold."""
    return SCORES_PER_BAND * 2 // problem.scratch.itemsize


@lru_cache(maxsize=256)
def bands_of(extent: Extent, scores: int, cut: bool) -> tuple[Band, ...]:
    """Return the bands for a scratch of some scores; if `cut`, no band is far wider than high."""
    batch = extent.batch
    room = None if extent.numbers is None else scores // extent.numbers
    found = _even(extent, room, cut)
    sizes = [
        (rows.stop - rows.start) * _padded(keys.stop - keys.start, ALIGNMENT)
        for rows, keys in found
    ]
    largest = max([1, *sizes])
    group = batch if room is None else max(1, min(batch, room // largest))
    group = cdiv(batch, cdiv(batch, group))  # no small group at the end
    return tuple(
        Band(
            slice(first, min(batch, first + group)),
            rows,
            keys,
            shift=extent.offset + rows.start - keys.start,
            summed=max(0, extent.visible(rows.start) - keys.start),
            last=keys.stop == extent.visible(rows.stop),
        )
        for first in range(0, batch, group)
        for rows, keys in found
    )


def _even(extent: Extent, room: int | None, cut: bool) -> list[tuple[slice, slice]]:
    """Return rows and keys of as few bands as a room for scores allows, of about equal size.

    A last band of few rows would leave most of a GPU without a program.
    """
    found = _bands(extent, room, cut)
    if room is None or len(found) == 1:
        return found
    low, high = room // 2, room
    for _ in range(6):
        middle = (low + high) // 2
        tried = _bands(extent, middle, cut)
        if len(tried) > len(found):
            low = middle
        else:
            high, found = middle, tried
    return found


def _bands(extent: Extent, room: int | None, cut: bool) -> list[tuple[slice, slice]]:
    """Return rows and keys of bands, each as high as a room for scores allows."""
    rows, start = extent.rows, 0
    found: list[tuple[slice, slice]] = []
    while start < rows:
        height, pieces = rows - start, 1
        if room is not None:
            height = min(height, highest(extent, start, room))
            widest = max(ALIGNMENT, _whole_blocks(isqrt(ASPECT * room)))
            if cut and start + height < rows and extent.visible(start + height) > widest:
                height = min(rows - start, max(ALIGNMENT, _whole_blocks(room // widest)))
                pieces = cdiv(extent.visible(start + height), widest)
        keys = extent.visible(start + height)
        width = _padded(cdiv(keys, pieces), ALIGNMENT)
        found += [
            (slice(start, start + height), slice(first, min(keys, first + width)))
            for first in range(0, keys, width)
        ]
        start += height
    return found


def _padded(size: int, part: int) -> int:
    """Return the least multiple of a part from a size on."""
    return cdiv(size, part) * part


def _whole_blocks(size: int) -> int:
    """Return the largest multiple of `ALIGNMENT` up to a size."""
    return size // ALIGNMENT * ALIGNMENT


def highest(extent: Extent, start: int, room: int) -> int:
    """Return how many rows from `start` on fit a scratch with `room` scores for a head."""
    height = room // (cdiv(extent.keys, ALIGNMENT) * ALIGNMENT)
    if extent.causal:
        # The last of h rows sees c + h keys, and the scratch is padded by less than a block.
        c = max(0, extent.offset + start) + ALIGNMENT
        height = max(height, (isqrt(c * c + 4 * room) - c) // 2)
    return max(ALIGNMENT, _whole_blocks(height))


class Scratch(NamedTuple):
    """A buffer for the scores of a band at a time."""

    buffer: Tensor
    heads: int

    @classmethod
    def of(cls, problem: Problem, all_bands: tuple[Band, ...]) -> "Scratch":
        """Return a buffer for the largest of some bands of a problem."""
        heads = problem.query.shape[1]
        size = max(prod(cls.shape(band, heads)) for band in all_bands)
        return cls(problem.query.new_empty(size, dtype=problem.scratch), heads)

    @staticmethod
    def shape(band: Band, heads: int) -> tuple[int, int, int, int, int]:
        """Return the size of a band's scores, of whole blocks of keys."""
        batch, rows, keys = band.sizes
        return batch, rows, cdiv(keys, ALIGNMENT), heads, ALIGNMENT

    def view(self, band: Band) -> Float[Tensor, "group rows blocks heads keys"]:
        """Return the scores of a band."""
        shape = self.shape(band, self.heads)
        return self.buffer[: prod(shape)].view(shape)


class Diagonals(NamedTuple):
    """The diagonals of tiles of a band: q holds distances q K + offset + m - n, m < M, n < K.

    `slot` numbers the first diagonal among the diagonals of the whole problem.
    """

    first: int
    number: int
    slot: int
    band_tile: int
    offset: int


def diagonals(
    problem: Problem, band: Band, tile_rows: int, tile_keys: int, reach: int = 0
) -> Diagonals:
    """Return the diagonals of a band for tiles of M rows and K keys, M dividing K.

    With a `reach` rows see `reach` further keys, for the hidden units of convolutions.
    """
    _, rows, keys = band.sizes
    lowest = _lowest_diagonal(problem, tile_rows, tile_keys, reach)
    band_tile = (band.shift + reach) // tile_keys
    first = max(lowest, band_tile + 1 - cdiv(keys + reach, tile_keys))
    last_row = (cdiv(rows, tile_rows) - 1) * tile_rows
    last = band_tile + (last_row + tile_keys - 1) // tile_keys
    number = max(0, last + 1 - first)
    return Diagonals(first, number, first - lowest, band_tile, (problem.offset + reach) % tile_keys)


def _lowest_diagonal(problem: Problem, tile_rows: int, tile_keys: int, reach: int = 0) -> int:
    """Return the first diagonal of a whole problem."""
    extent, offset = Extent.of(problem), problem.offset + reach
    first = offset // tile_keys + 1 - cdiv(extent.visible(extent.rows) + reach, tile_keys)
    if problem.causal:
        first = max(first, -((offset % tile_keys + tile_rows - 1) // tile_keys))
    return first


def count_diagonals(
    problem: Problem, tile_rows: int, tile_keys: int, *reaches: int
) -> tuple[int, int, int]:
    """Return the elements and rows of a block, and how many diagonals all blocks have together."""
    all_bands = blocks(problem)
    found = [diagonals(problem, x, tile_rows, tile_keys, n) for x in all_bands for n in reaches]
    rows = max(band.sizes[1] for band in all_bands)
    return all_bands[0].batch.stop, rows, max(where.slot + where.number for where in found)


def lowest_distance(problem: Problem, tile_rows: int, tile_keys: int, reach: int = 0) -> int:
    """Return the distance i + reach - j of the first line of the first diagonal of a problem."""
    first = _lowest_diagonal(problem, tile_rows, tile_keys, reach)
    return first * tile_keys + (problem.offset + reach) % tile_keys - (tile_keys - 1)
