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
from dape.attention.fused.sizes import Tile, next_power_of_2, padded
from dape.attention.fused.sums import add_up, fold, zeros
from dape.attention.fused.terms import Taps

# The fastest of a few on an H100 at 12 heads, 32 hidden units and 3 taps.
TILE = Tile(4, 16, 4, 3)
# Tiles that fit the registers if the padded hidden units of a position's taps have more than
# MOST_BYTES, and more than twice as many.
SMALL_TILE, SMALLEST_TILE, MOST_BYTES = Tile(8, 8, 8, 1), Tile(4, 4, 8, 1), 256


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
    """The partial sums of gradients, for each segment of each diagonal of each element of a group.

    U and b1 are summed along the diagonals of columns, which may be one more than the diagonals of
    keys.
    """

    static: Float[Tensor, "terms slots lines HEADS"]
    hidden: Float[Tensor, "terms slots lines TAPS UNITS"]
    weight_in: Float[Tensor, "terms slots TAPS UNITS HEADS"]
    weight_out: Float[Tensor, "terms slots TAPS UNITS HEADS"]
    hidden_bias: Float[Tensor, "terms slots UNITS"]
    segments: int


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
    slots: Slots,
    lowest: tuple[int, int],
    step: int,
    unit: Float[Tensor, ""],
    into: Taps,
) -> None:
    """Fill the gradients of C, U, W1, W2 and b1, times `unit`, from the sums of all slots.

    `lowest` are the distances to a key, and to the key of tap 0 from a column, of the first line of
    the first diagonal. The lines of the next diagonal are `step` further.
    """
    bias = into.hidden_bias
    fold(problem, slots.static, lowest[0], step, unit, into.static.t())
    for tap, table in enumerate(into.hidden.split(len(bias), dim=1)):
        fold(problem, slots.hidden[:, :, :, tap], lowest[1] - tap, step, unit, table)
    padded_sizes = slots.weight_in.shape[3:]
    for sums, layer in (
        (slots.weight_in, into.weight_in),
        (slots.weight_out, into.weight_out.t()),
    ):
        add_up(problem, sums, padded_sizes, unit, layer, groups=into.taps)
    add_up(problem, slots.hidden_bias, (slots.hidden_bias.shape[2], 1), unit, bias[:, None])


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
        started = mask
        if problem.mask is not None:
            started = mask.to(torch.uint8).argmax(1).to(torch.int32)
            if problem.begun is not None:
                started.masked_fill_(problem.begun[band.batch], 0)
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
        z, p, count = given.hidden, torch.empty_like(x), slots.static.shape[1]
        by_key, by_column = (
            [where.first, where.band_tile, where.offset, count]
            for where in (given.keys, given.columns)
        )
        at_key, at_column = (slice(where.slot, None) for where in (given.keys, given.columns))
        strides = (*x.stride()[:2], *z.stride()[:2])
        lines, compiled = _lines_of(self.tile), {**self.compiled(), "num_stages": 1}
        start(kernels.convolution_backward_kernel, (given.keys.number, batch, slots.segments))(
            x, p, y, z, terms.weight_out, terms.static, rows.lse, given.mask,
            slots.static[:, at_key], slots.weight_out[:, at_key], *self.counted(),
            *size, band.shift, terms.static.shape[1], *by_key,
            *strides, *rows.lse.stride(), given.mask.stride(0), LINES=lines, **compiled,
        )  # fmt: skip
        start(kernels.hidden_backward_kernel, (given.columns.number, batch, slots.segments))(
            y, z, terms.weight_out, given.mask, given.started,
            slots.hidden[:, at_column], slots.hidden_bias[:, at_column],
            *size, band.shift, *by_column,
            *strides, given.mask.stride(0), LINES=lines, **compiled,
        )  # fmt: skip
        start(kernels.grad_scores_kernel, (given.keys.number, batch, slots.segments))(
            x, y, z, terms.weight_in, given.mask, slots.weight_in[:, at_key],
            *size, band.shift, *by_key[:2], count,
            *strides, given.mask.stride(0), **compiled,
        )  # fmt: skip
        return p, y

    def counted(self) -> tuple[int, int]:
        """Return the first key with a weight, and the key after the last."""
        first, last = self.problem.halo
        return first, self.problem.key.shape[2] - last

    def slots(self) -> Slots:
        """Return partial sums of zero for the bands of the problem."""
        compiled, tile = self.compiled(), self.tile
        taps, units, heads = (compiled[x] for x in ("TAPS", "UNITS", "HEADS"))
        reach, lines = self.terms.taps // 2, _lines_of(tile)
        group, rows, count = count_diagonals(self.problem, *tile[:2], 0, reach)
        segments = self.segments(group, count, rows)
        lead = group * segments, count
        shapes = (lines, heads), (lines, taps, units), (taps, units, heads), (taps, units, heads)
        made = zeros(self.problem.query, *((*lead, *x) for x in (*shapes, (units,))))
        static, hidden, weight_in, weight_out, hidden_bias = made
        return Slots(static, hidden, weight_in, weight_out, hidden_bias, segments)

    def gradients(self, slots: Slots, unit: Float[Tensor, ""], into: Taps) -> None:
        """Fill the gradients of C, U, W1, W2 and b1, times `unit`."""
        problem, tile = self.problem, self.tile
        lowest = (
            lowest_distance(problem, *tile[:2]),
            lowest_distance(problem, *tile[:2], into.taps // 2),
        )
        add_slots(problem, slots, lowest, tile.keys, unit, into)

    def compiled(self) -> dict[str, Any]:
        """Return the compile-time arguments and the launch options of every kernel."""
        units, tile, taps = len(self.terms.hidden_bias), self.tile, self.terms.taps
        return {
            **Mixer.compiled(self), "M": tile.rows, "K": tile.keys,
            "D": units, "UNITS": padded(units), "T": taps, "TAPS": next_power_of_2(taps),
            **tile.pace(),
        }  # fmt: skip
