"""The kernels across heads for DAPE V2, in Triton: layers that are convolutions along the keys."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused import convolution, mix_triton
from dape.attention.fused.banded import Mixer, Tile
from dape.attention.fused.geometry import (
    Band,
    Diagonals,
    Mixing,
    Problem,
    blocks,
    diagonals,
    next_power_of_2,
)
from dape.attention.fused.mix_triton import share, walk, whole
from dape.attention.fused.slots import add_up, fold, lowest, padded_size, zeros

__all__ = ["Slots", "mix", "mix_backward", "walk", "whole"]

# The fastest of a few on an H100 at 12 heads, 32 hidden units and 3 taps.
TILE = Tile(4, 16, 4, 3)
# What fits the registers where a position's taps have more bytes of hidden units, padded, or still
# more.
SMALL_TILE, SMALLEST_TILE, MOST_BYTES = Tile(8, 8, 8, 1), Tile(4, 4, 8, 1), 256


def tile_of(problem: Problem) -> Tile:
    """Return the tile that moves along a diagonal."""
    channels = next_power_of_2(problem.taps) * padded_size(len(hidden_bias_of(problem)))
    size = channels * problem.scratch.itemsize
    if size > 2 * MOST_BYTES:
        return SMALLEST_TILE
    return SMALL_TILE if size > MOST_BYTES else TILE


def hidden_bias_of(problem: Problem) -> Float[Tensor, "hidden"]:
    """Return b1 of a problem of DAPE V2; others have another mixer."""
    assert problem.hidden_bias is not None
    return problem.hidden_bias


class Pass(NamedTuple):
    """What all kernels of a band take: sizes, the mask, and the diagonals of keys and of columns.

    Columns are the hidden units' positions. `started` is the first key of each element that its
    mask shows: before it a row has no hidden units.
    """

    keys: Diagonals
    columns: Diagonals
    mask: Tensor
    started: Tensor
    hidden: Tensor
    compiled: dict[str, Any]
    launch: dict[str, int]

    @classmethod
    def of(cls, x: Tensor, band: Band, problem: Problem, mixing: Mixing) -> "Pass":
        """Return that of a band, with room for its hidden units."""
        batch, rows, keys = band.sizes
        compiled, tile = sizes(problem, mixing), tile_of(problem)
        reach = problem.taps // 2
        mask, started = x, torch.zeros(batch, dtype=torch.int32, device=x.device)
        if problem.mask is not None:
            mask = problem.mask[band.batch, band.keys]
            started = mask.to(torch.uint8).argmax(1).to(torch.int32)
            if problem.begun is not None:
                started.masked_fill_(problem.begun[band.batch], 0)
        return cls(
            diagonals(problem, band, *tile[:2]),
            diagonals(problem, band, *tile[:2], reach),
            mask,
            started,
            x.new_empty(batch, rows, keys + reach, compiled["UNITS"]),
            compiled,
            {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        )


def fill_hidden(x: Tensor, band: Band, problem: Problem, mixing: Mixing, given: Pass) -> None:
    """Fill the hidden units of a band from its scores."""
    batch, rows, keys = band.sizes
    where, z = given.columns, given.hidden
    segments = share(batch, where.number, rows)[1]
    convolution.hidden_kernel[(where.number, batch, segments)](
        x, z, mixing.weight_in, mixing.hidden, hidden_bias_of(problem), given.mask, given.started,
        rows, keys, band.shift, mixing.hidden.shape[0], where.first, where.band_tile, where.offset,
        *x.stride()[:2], *z.stride()[:2], given.mask.stride(0), **given.compiled, **given.launch,
    )  # fmt: skip


def mix(x: Tensor, band: Band, problem: Problem, mixing: Mixing) -> None:
    """Turn the scores X of a band into logits, in place; -inf where unseen."""
    given = Pass.of(x, band, problem, mixing)
    fill_hidden(x, band, problem, mixing, given)
    batch, rows, keys = band.sizes
    where, z = given.keys, given.hidden
    segments = share(batch, where.number, rows)[1]
    convolution.convolution_mix_kernel[(where.number, batch, segments)](
        x, z, mixing.weight_out, mixing.static, given.mask, *counted(problem),
        rows, keys, band.shift, mixing.static.shape[1], where.first, where.band_tile, where.offset,
        *x.stride()[:2], *z.stride()[:2], given.mask.stride(0), **given.compiled, **given.launch,
    )  # fmt: skip


def mix_backward(
    x: Tensor,
    y: Tensor,
    band: Band,
    problem: Problem,
    mixing: Mixing,
    lse: Tensor,
    delta: Tensor,
    slots: "Slots",
) -> tuple[Tensor, Tensor]:
    """Return P and dA of a band from scores X and, in place, dP in Y; add to the slots."""
    given = Pass.of(x, band, problem, mixing)
    fill_hidden(x, band, problem, mixing, given)
    batch, rows, keys = band.sizes
    z, p, count = given.hidden, torch.empty_like(x), slots.static.shape[1]
    by_key, by_column = (
        [*where[:1], where.band_tile, where.offset, count] for where in (given.keys, given.columns)
    )
    at_key, at_column = (slice(where.slot, None) for where in (given.keys, given.columns))
    strides = (*x.stride()[:2], *z.stride()[:2])
    lines = lines_of(tile_of(problem))
    compiled = {**given.compiled, **given.launch, "num_stages": 1}
    convolution.convolution_backward_kernel[(given.keys.number, batch, slots.segments)](
        x, p, y, z, mixing.weight_out, mixing.static, lse, delta, given.mask,
        slots.static[:, at_key], slots.weight_out[:, at_key], *counted(problem),
        rows, keys, band.shift, mixing.static.shape[1], *by_key,
        *strides, *lse.stride(), given.mask.stride(0), LINES=lines, **compiled,
    )  # fmt: skip
    convolution.hidden_backward_kernel[(given.columns.number, batch, slots.segments)](
        y, z, mixing.weight_out, given.mask, given.started,
        slots.hidden[:, at_column], slots.hidden_bias[:, at_column],
        rows, keys, band.shift, *by_column,
        *strides, given.mask.stride(0), LINES=lines, **compiled,
    )  # fmt: skip
    convolution.grad_scores_kernel[(given.keys.number, batch, slots.segments)](
        x, y, z, mixing.weight_in, given.mask, slots.weight_in[:, at_key],
        rows, keys, band.shift, *by_key[:2], count,
        *strides, given.mask.stride(0), **compiled,
    )  # fmt: skip
    return p, y


def counted(problem: Problem) -> tuple[int, int]:
    """Return the first key that has a weight, and the end of those that have."""
    return problem.halo[0], problem.key.shape[2] - problem.halo[1]


def lines_of(tile: Tile) -> int:
    """Return how many diagonals of a tile there are, and one."""
    return next_power_of_2(tile.rows + tile.keys - 1)


class Slots(NamedTuple):
    """Where each segment of each diagonal of each element of a group sums its gradients.

    Those of U and b1 belong to diagonals of columns, of which there may be one more.
    """

    static: Float[Tensor, "terms slots lines HEADS"]
    hidden: Float[Tensor, "terms slots lines TAPS UNITS"]
    weight_in: Float[Tensor, "terms slots TAPS UNITS HEADS"]
    weight_out: Float[Tensor, "terms slots TAPS UNITS HEADS"]
    hidden_bias: Float[Tensor, "terms slots UNITS"]
    segments: int

    @classmethod
    def of(cls, problem: Problem, mixing: Mixing, mixer: Mixer) -> "Slots":
        """Return zeros for the bands of a problem."""
        taps, units, heads = (sizes(problem, mixing)[x] for x in ("TAPS", "UNITS", "HEADS"))
        tile, all_bands, reach = tile_of(problem), blocks(problem), problem.taps // 2
        lines = lines_of(tile)
        found = [
            diagonals(problem, band, *tile[:2], wider) for band in all_bands for wider in (0, reach)
        ]
        count, group = max(where.slot + where.number for where in found), all_bands[0].batch.stop
        segments = share(group, count, max(band.sizes[1] for band in all_bands))[1]

        lead = group * segments, count
        shapes = (lines, heads), (lines, taps, units), (taps, units, heads), (taps, units, heads)
        made = zeros(problem.query, *((*lead, *x) for x in (*shapes, (units,))))
        static, hidden, weight_in, weight_out, hidden_bias = made
        return cls(static, hidden, weight_in, weight_out, hidden_bias, segments)

    def gradients(
        self,
        problem: Problem,
        mixing: Mixing,
        mixer: Mixer,
        unit: Float[Tensor, ""],
        tables: Sequence[Tensor],
    ) -> None:
        """Fill the gradients of C, U, W1, W2 and b1, times `unit`."""
        static, hidden, weight_in, weight_out, bias = tables
        units, taps = len(bias), problem.taps
        tile = tile_of(problem)
        fold(problem, self.static, lowest(problem, *tile[:2]), tile.keys, unit, static.t())
        # A line of columns is r further than the distance to them, and t less to the key of tap t.
        first = lowest(problem, *tile[:2], taps // 2)
        for tap, table in enumerate(hidden.split(units, dim=1)):
            fold(problem, self.hidden[:, :, :, tap], first - tap, tile.keys, unit, table)
        padded = self.weight_in.shape[3:]
        add_up(problem, self.weight_in, padded, unit, weight_in, groups=taps)
        add_up(problem, self.weight_out, padded, unit, weight_out.t(), groups=taps)
        add_up(problem, self.hidden_bias, (self.hidden_bias.shape[2], 1), unit, bias[:, None])


def sizes(problem: Problem, mixing: Mixing) -> dict[str, Any]:
    """Return the compile-time arguments: counts, padded, and switches."""
    units, tile = len(hidden_bias_of(problem)), tile_of(problem)
    return {
        **mix_triton.sizes(problem, mixing),
        "M": tile.rows,
        "K": tile.keys,
        "D": units,
        "UNITS": padded_size(units),
        **problem.gated(),
        "T": problem.taps,
        "TAPS": next_power_of_2(problem.taps),
    }
