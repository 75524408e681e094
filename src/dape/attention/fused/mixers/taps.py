"""Heads mixed by convolutions along the keys, in Triton."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused.geometry import (
    Diagonals,
    count_diagonals,
    diagonals,
    lowest_distance,
)
from dape.attention.fused.mixers import taps_kernels as kernels
from dape.attention.fused.mixers.mixer import Mixer
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Band, Problem
from dape.attention.fused.rows import Rows
from dape.attention.fused.sizes import Tile, cdiv, next_power_of_2, padded
from dape.attention.fused.sums import distances_at_once, slots_at_once, zeros
from dape.attention.fused.terms import Taps

# The fastest of a few on an H100 at 12 heads, 32 hidden units and 3 taps.
TILE = Tile(4, 16, 4, 3)
# Tiles that fit the registers if the padded hidden units of a position's taps have more than
# MOST_BYTES, and more than twice as many.
SMALL_TILE, SMALLEST_TILE, MOST_BYTES = Tile(8, 8, 4, 1), Tile(4, 8, 4, 1), 256


class Pass(NamedTuple):
    """The arguments of all kernels of a band: diagonals of keys and of columns, the mask, and Z.

    A column is a position of hidden units. `started` is the first key of each element that the mask
    shows, and unused without a mask. Before `started` a row has no hidden units.
    """

    keys: Diagonals
    columns: Diagonals
    mask: Tensor
    started: Tensor
    hidden: Float[Tensor, "batch rows columns UNITS"]


class Slots(NamedTuple):
    """Partial sums of gradients, for each segment of each diagonal of each element of a group.

    A slot has the parts of `sizes_of`. U and b1 are summed along the diagonals of columns, which
    may be one more than the diagonals of keys.
    """

    sums: Float[Tensor, "terms slots size"]
    segments: int


def sizes_of(lines: int, taps: int, units: int, heads: int) -> list[int]:
    """Return how many numbers a slot has of C, U, W1, W2 and b1, for padded sizes.

    C is `[lines, HEADS]`, U `[lines, TAPS, UNITS]`, W1 and W2 are `[TAPS, UNITS, HEADS]`.
    """
    layer = taps * units * heads
    return [lines * heads, lines * taps * units, layer, layer, units]


def tile_of(problem: Problem, terms: Taps) -> Tile:
    """Return the tile that moves along a diagonal."""
    size = next_power_of_2(terms.taps) * padded(len(terms.hidden_bias)) * problem.scratch.itemsize
    if size > 2 * MOST_BYTES:
        return SMALLEST_TILE
    return SMALL_TILE if size > MOST_BYTES else TILE


def _lines_of(tile: Tile) -> int:
    """Return the number of diagonals of a tile, rounded up to a power of two."""
    return next_power_of_2(tile.rows + tile.keys - 1)


def add_slots(
    problem: Problem,
    sums: Float[Tensor, "terms slots size"],
    lines: int,
    taps: int,
    lowest: tuple[int, int],
    step: int,
    unit: Float[Tensor, ""],
    into: Taps,
) -> None:
    """Fill the gradients of C, U, W1, W2 and b1, times `unit`, from the sums of all slots.

    `lowest` are the distances to a key, and to the key of tap 0 from a column, of the first line of
    the first diagonal. The lines of the next diagonal are `step` further. `taps` are padded.
    """
    (terms, count, size), (heads, distances) = sums.shape, into.static.shape
    units = len(into.hidden_bias)
    layers = sum(sizes_of(lines, taps, padded(units), padded(heads))[2:])
    at_once, entries = slots_at_once(terms * count)
    of_head = distances_at_once(terms, distances, heads, padded(heads))
    of_tap = distances_at_once(terms, distances, units, padded(units))
    programs = cdiv(distances, of_head[0]) + into.taps * cdiv(distances, of_tap[0])
    start(kernels.taps_gradients_kernel, (programs + cdiv(layers, entries),))(
        sums, unit, *into, terms, count, count * size, size, *lowest, step, distances,
        H=heads, D=units, T=into.taps, HEADS=padded(heads), UNITS=padded(units), TAPS=taps,
        LINES=lines, SPANS=cdiv(lines, step), SLOTS=at_once, OUT=entries,
        ROWS=of_head[0], TERMS=of_head[1], ROWS_OF_TAP=of_tap[0], TERMS_OF_TAP=of_tap[1],
        **problem.gated(), num_warps=4,
    )  # fmt: skip


class TapsMixer(Mixer[Taps]):
    """A mixer whose layers are convolutions of any odd width, by four kernels."""

    __slots__ = ()

    @property
    def tile(self) -> Tile:
        """Return the tile of the problem."""
        return tile_of(self.problem, self.terms)

    def begin(self, x: Tensor, band: Band) -> Pass:
        """Return the arguments of the kernels of a band, with the hidden units of its scores."""
        problem, tile, reach = self.problem, self.tile, self.terms.taps // 2
        batch, rows, keys = band.sizes
        mask = self.mask(x, band)
        started = self.started(mask, band)
        given = Pass(
            diagonals(problem, band, *tile[:2]),
            diagonals(problem, band, *tile[:2], reach),
            mask,
            started,
            x.new_empty(batch, rows, keys + reach, padded(len(self.terms.hidden_bias))),
        )
        where, z, terms = given.columns, given.hidden, self.terms
        segments = self.segments(batch, where.number, rows)
        start(kernels.hidden_kernel, (where.number, batch, segments))(
            x, z, terms.weight_in, terms.hidden, terms.hidden_bias, mask, started,
            rows, keys, band.shift, len(terms.hidden), where.first, where.band_tile, where.offset,
            *x.stride()[:2], *z.stride()[:2], mask.stride(0), **self.compiled(),
        )  # fmt: skip
        return given

    def started(self, mask: Tensor, band: Band) -> Tensor:
        """Return the first key of each element that the mask shows; without a mask any tensor."""
        if self.problem.mask is None:
            return mask
        found = mask.to(torch.uint8).argmax(1).to(torch.int32)
        if self.problem.begun is not None:
            found.masked_fill_(self.problem.begun[band.batch], 0)
        return found

    def mix(self, x: Tensor, band: Band) -> Tensor:
        """Return logits of a band, in place of scores X; -inf where unseen."""
        given, terms = self.begin(x, band), self.terms
        batch, rows, keys = band.sizes
        where, z = given.keys, given.hidden
        segments = self.segments(batch, where.number, rows)
        start(kernels.convolution_mix_kernel, (where.number, batch, segments))(
            x, z, terms.weight_out, terms.static, given.mask, *self.counted(),
            rows, keys, band.shift, terms.static.shape[1],
            where.first, where.band_tile, where.offset,
            *x.stride()[:2], *z.stride()[:2], given.mask.stride(0), **self.compiled(),
        )  # fmt: skip
        return x

    def mix_backward(
        self, x: Tensor, y: Tensor, band: Band, rows: Rows, slots: Slots
    ) -> tuple[Tensor, Tensor]:
        """Return P and dA of a band from scores X and, in place, Y; add to the slots."""
        given, terms = self.begin(x, band), self.terms
        batch, *size = band.sizes
        z, p, counts = given.hidden, torch.empty_like(x), slots.sums.shape[1:]
        by_key, by_column = (
            [where.first, where.band_tile, where.offset, *counts]
            for where in (given.keys, given.columns)
        )
        compiled = {**self.compiled(), "num_stages": 1}
        static, hidden, weight_in, weight_out, bias = (
            part[:, where.slot :]
            for part, where in zip(
                slots.sums.split(self.sizes(), dim=2),
                (given.keys, given.columns, given.keys, given.keys, given.columns),
                strict=True,
            )
        )
        strides = (*x.stride()[:2], *z.stride()[:2])
        lines = _lines_of(self.tile)
        start(kernels.convolution_backward_kernel, (given.keys.number, batch, slots.segments))(
            x, p, y, z, terms.weight_out, terms.static, rows.lse, given.mask,
            static, weight_out, *self.counted(),
            *size, band.shift, terms.static.shape[1], *by_key,
            *strides, *rows.lse.stride(), given.mask.stride(0), LINES=lines, **compiled,
        )  # fmt: skip
        start(kernels.hidden_backward_kernel, (given.columns.number, batch, slots.segments))(
            y, z, terms.weight_out, given.mask, given.started,
            hidden, bias, *size, band.shift, *by_column,
            *strides, given.mask.stride(0), LINES=lines, **compiled,
        )  # fmt: skip
        start(kernels.grad_scores_kernel, (given.keys.number, batch, slots.segments))(
            x, y, z, terms.weight_in, given.mask, weight_in,
            *size, band.shift, *by_key[:2], *counts,
            *strides, given.mask.stride(0), **compiled,
        )  # fmt: skip
        return p, y

    def counted(self) -> tuple[int, int]:
        """Return the first key with a weight, and the key after the last."""
        first, last = self.problem.halo
        return first, self.problem.key.shape[2] - last

    def slots(self) -> Slots:
        """Return partial sums of zero for the bands of the problem."""
        tile = self.tile
        group, rows, count = count_diagonals(self.problem, *tile[:2], 0, self.terms.taps // 2)
        segments = self.segments(group, count, rows)
        shape = group * segments, count, sum(self.sizes())
        (sums,) = zeros(self.problem.query, shape)
        return Slots(sums, segments)

    def sizes(self) -> list[int]:
        """Return the sizes of the parts of a slot."""
        taps, units, heads = (self.compiled()[x] for x in ("TAPS", "UNITS", "HEADS"))
        return sizes_of(_lines_of(self.tile), taps, units, heads)

    def gradients(self, slots: Slots, unit: Float[Tensor, ""], into: Taps) -> None:
        """Fill the gradients of C, U, W1, W2 and b1, times `unit`."""
        problem, tile, reach = self.problem, self.tile, into.taps // 2
        lowest = (
            lowest_distance(problem, *tile[:2]),
            lowest_distance(problem, *tile[:2], reach),
        )
        lines, taps = _lines_of(tile), next_power_of_2(into.taps)
        add_slots(problem, slots.sums, lines, taps, lowest, tile.keys, unit, into)

    def compiled(self) -> dict[str, Any]:
        """Return the compile-time arguments and the launch options of every kernel."""
        units, tile, taps = len(self.terms.hidden_bias), self.tile, self.terms.taps
        return {
            **Mixer.compiled(self), "M": tile.rows, "K": tile.keys,
            "D": units, "UNITS": padded(units), "T": taps, "TAPS": next_power_of_2(taps),
            **tile.pace(),
        }  # fmt: skip
