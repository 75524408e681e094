"""Heads mixed by tables over the distance, in Triton: any GPU and dtype, and a CPU by interpreter.

A program walks along a diagonal of tiles, sums gradients along the lines of a tile, and writes the
sums to its slot.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused.geometry import blocks, count_diagonals, diagonals, lowest_distance
from dape.attention.fused.mixers import mixed_kernels as kernels
from dape.attention.fused.mixers.mixer import Mixer
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Band
from dape.attention.fused.rows import Rows
from dape.attention.fused.sizes import cdiv, padded
from dape.attention.fused.sums import cleared, distances_at_once, slots_at_once
from dape.attention.fused.terms import Mixed

# Rows of a tile of the forward kernel, which has no sums in its registers.
MIX_ROWS = 8


class Slots(NamedTuple):
    """Partial sums of gradients: a slot for some elements, a segment of a diagonal and a share.

    A slot holds U `[lines, UNITS]`, C `[HEADS, lines]`, W1 `[HEADS, UNITS]` and W2 likewise. Slots
    are zero at first if several bands `add`. Without `add` a band overwrites the slots.
    """

    sums: Float[Tensor, "terms slots size"]
    elements: int
    segments: int
    add: bool


class MixedMixer(Mixer[Mixed]):
    """A mixer whose programs walk along diagonals of tiles of a fixed size.

    Gradients are summed along the `lines` of a tile. If several programs divide the rows of a tile
    into `shares`, the gradients are summed along the lines of a share.
    """

    __slots__ = ()
    # With more rows the backward kernel spills registers.
    tile_rows, tile_keys, lines, shares = 4, 16, 32, 1

    @property
    def static(self) -> Tensor:
        """Return C, which logits of `mix` lack."""
        return self.terms.static

    def share(self, batch: int, diagonals: int, rows: int) -> tuple[int, int]:
        """Return the number of elements for a program, and of segments of a diagonal.

        `diagonals` counts the diagonals of an element.
        """
        return 1, self.segments(batch, diagonals, rows)

    def sizes(self) -> list[int]:
        """Return how many numbers a slot holds of U, C, W1 and W2."""
        units, heads = map(padded, self.terms.weight_in.shape)
        return [self.lines * units, self.lines * heads, heads * units, heads * units]

    def slots(self) -> Slots:
        """Return room for the blocks of the problem."""
        problem = self.problem
        group, rows, count = count_diagonals(problem, self.tile_rows, self.tile_keys, 0)
        elements, segments = self.share(group, count, rows)
        shape = cdiv(group, elements) * segments, count * self.shares, sum(self.sizes())
        add = len(blocks(problem)) > 1
        sums = problem.query.new_empty(shape, dtype=torch.float32)
        return Slots(cleared(sums, self.problem) if add else sums, elements, segments, add)

    def mix(self, x: Tensor, band: Band) -> Tensor:
        """Return logits without C of a band, in place of scores X; -inf where unseen."""
        terms, mask = self.terms, self.mask(x, band)
        where = diagonals(self.problem, band, MIX_ROWS, self.tile_keys)
        batch, rows, keys = band.sizes
        _, segments = self.share(batch, where.number, rows)
        start(kernels.mix_kernel, (where.number, batch, segments))(
            x, terms.weight_in, terms.weight_out, terms.hidden, mask, rows, keys, len(terms.hidden),
            where.first, where.band_tile, where.offset, *x.stride()[:2], mask.stride(0),
            **{**self.compiled(), "M": MIX_ROWS}, num_warps=4,
        )  # fmt: skip
        return x

    def mix_backward(
        self, x: Tensor, y: Tensor, band: Band, rows: Rows, slots: Slots
    ) -> tuple[Tensor, Tensor]:
        """Return P and dA of a band in place of scores X and of Y; add to the slots."""
        terms, mask = self.terms, self.mask(x, band)
        where = diagonals(self.problem, band, self.tile_rows, self.tile_keys)
        batch, count, keys = band.sizes
        start(kernels.mix_backward_kernel, (where.number, batch, slots.segments))(
            x, y, terms.weight_in, terms.weight_out, terms.hidden, terms.static,
            rows.lse, mask, slots.sums[:, where.slot :],
            count, keys, len(terms.hidden),
            where.first, where.band_tile, where.offset, *slots.sums.shape[1:],
            *x.stride()[:2], *rows.lse.stride(), mask.stride(0), LINES=self.lines, ADD=slots.add,
            **self.compiled(), num_warps=4, num_stages=1,
        )  # fmt: skip
        return x, y

    def gradients(self, slots: Slots, unit: Float[Tensor, ""], into: Mixed) -> None:
        """Fill the gradients of C, U, W1 and W2, times `unit`."""
        problem, (count, units) = self.problem, self.terms.hidden.shape
        terms, number, size = slots.sums.shape
        heads, step = len(self.terms.static), self.tile_keys // self.shares
        first = lowest_distance(problem, self.tile_rows, self.tile_keys)
        at_once, entries = slots_at_once(terms * number)
        rows, terms_of_rows = distances_at_once(terms, count, units, padded(units))
        line, terms_of_line = distances_at_once(terms, count, heads, 1)
        programs = 2 * padded(heads) * padded(units) // entries
        programs += cdiv(count, rows) + heads * cdiv(count, line)
        start(kernels.gradients_kernel, (programs,))(
            slots.sums, unit, into.static, into.hidden, into.weight_in, into.weight_out,
            terms, number, number * size, size, first, step, count,
            H=heads, D=units, HEADS=padded(heads), UNITS=padded(units),
            LINES=self.lines, SPANS=cdiv(self.lines, step), SLOTS=at_once, OUT=entries,
            ROWS=rows, TERMS=terms_of_rows, OF_HEAD=line, TERMS_OF_HEAD=terms_of_line,
            **problem.gated(), num_warps=4,
        )  # fmt: skip

    def compiled(self) -> dict[str, Any]:
        """Return the compile-time arguments of the two kernels."""
        return {**super().compiled(), "M": self.tile_rows, "K": self.tile_keys}
