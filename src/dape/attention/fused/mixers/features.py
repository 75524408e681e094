"""Heads mixed by tables over the features of FIRE, in Triton."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused.geometry import count_diagonals, diagonals, lowest_distance
from dape.attention.fused.mixers import features_kernels as kernels
from dape.attention.fused.mixers.mixer import Mixer
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Band, Problem
from dape.attention.fused.rows import Rows
from dape.attention.fused.sizes import padded
from dape.attention.fused.sums import add_up, fold, zeros
from dape.attention.fused.terms import Features

# A tile that fits the registers, and its padded number of lines.
TILE_ROWS, TILE_KEYS, LINES = 8, 16, 32


class Slots(NamedTuple):
    """Partial sums of gradients: a slot for an element and a diagonal; `scale` is for all slots."""

    weight_in: Float[Tensor, "group slots UNITS HEADS"]
    weight_out: Float[Tensor, "group slots HEADS UNITS"]
    hidden: Float[Tensor, "group slots 1+FEATURES UNITS"]
    static: Float[Tensor, "group slots 1+FEATURES HEADS"]
    psi: Float[Tensor, "group slots lines"]
    weight: Float[Tensor, "group slots FEATURES"]
    bias: Float[Tensor, "group slots FEATURES"]
    scale: Float[Tensor, "indices"]


class FeaturesMixer(Mixer[Features]):
    """A mixer whose tables are over features."""

    __slots__ = ()

    def slots(self) -> Slots:
        """Return zeros for the blocks of the problem."""
        group, _, count = count_diagonals(self.problem, TILE_ROWS, TILE_KEYS, 0)
        units, heads = map(padded, self.terms.weight_in.shape)
        features = padded(len(self.terms.weight))
        shapes = (
            *((units, heads), (heads, units), (1 + features, units), (1 + features, heads)),
            *((LINES,), (features,), (features,)),
        )
        lead, scale = (group, count), tuple(self.terms.scale.shape)
        return Slots(*zeros(self.problem.query, *((*lead, *x) for x in shapes), scale))

    def tables(self, band: Band) -> list[Tensor]:
        """Return the terms of a band in the order of the kernels."""
        static, hidden, weight_in, weight_out, *features = self.terms.part(band.keys)
        return [weight_in, weight_out, hidden, static, *features]

    def mix(self, x: Tensor, band: Band) -> Tensor:
        """Return logits of a band, in place of scores X; -inf where unseen."""
        where, mask = diagonals(self.problem, band, TILE_ROWS, TILE_KEYS), self.mask(x, band)
        batch, rows, keys = band.sizes
        start(kernels.fire_mix_kernel, (where.number, batch))(
            x, *self.tables(band), mask, rows, keys, len(self.terms.psi),
            where.first, where.band_tile, where.offset, *x.stride()[:2], mask.stride(0),
            **self.compiled(), num_warps=4,
        )  # fmt: skip
        return x

    def mix_backward(
        self, x: Tensor, y: Tensor, band: Band, rows: Rows, slots: Slots
    ) -> tuple[Tensor, Tensor]:
        """Return P and dA of a band in place of scores X and of Y; add to the slots."""
        where, mask = diagonals(self.problem, band, TILE_ROWS, TILE_KEYS), self.mask(x, band)
        batch, count, keys = band.sizes
        pairs = x.new_empty(batch, count, keys, dtype=torch.float32)
        start(kernels.fire_mix_backward_kernel, (where.number, batch))(
            x, y, *self.tables(band), rows.lse, mask,
            *(sums[:, where.slot :] for sums in slots[:-1]), pairs,
            count, keys, len(self.terms.psi),
            where.first, where.band_tile, where.offset, slots.psi.shape[1],
            *x.stride()[:2], *rows.lse.stride(), mask.stride(0), *pairs.stride()[:2],
            LINES=LINES, **self.compiled(), num_warps=8, num_stages=1,
        )  # fmt: skip
        add_pairs(self.problem, slots.scale[band.keys.start :], pairs, band)
        return x, y

    def gradients(self, slots: Slots, unit: Float[Tensor, ""], into: Features) -> None:
        """Fill the gradients of C, U, W1, W2, and of the features, times `unit`."""
        problem = self.problem
        first = lowest_distance(problem, TILE_ROWS, TILE_KEYS)
        fold(problem, slots.psi[..., None], first, TILE_KEYS, unit, into.psi[:, None])
        add_up(problem, slots.static, slots.static.shape[2:], unit, into.static.t())
        add_up(problem, slots.scale[None, None], (len(into.scale), 1), unit, into.scale[:, None])
        for sums, table in ((slots.weight, into.weight), (slots.bias, into.bias)):
            add_up(problem, sums, (sums.shape[2], 1), unit, table[:, None])
        if len(into.weight_in):
            add_up(problem, slots.hidden, slots.hidden.shape[2:], unit, into.hidden)
            add_up(problem, slots.weight_in, slots.weight_in.shape[2:], unit, into.weight_in)
            add_up(problem, slots.weight_out, slots.weight_out.shape[2:], unit, into.weight_out)

    def compiled(self) -> dict[str, Any]:
        """Return the compile-time arguments of the two kernels."""
        features = len(self.terms.weight)
        sizes = {"M": TILE_ROWS, "K": TILE_KEYS, "F": features, "FEATURES": padded(features)}
        return {**Mixer.compiled(self), **sizes}


def add_pairs(
    problem: Problem,
    total: Float[Tensor, "indices"],
    pairs: Float[Tensor, "batch rows groups"],
    band: Band,
    width: int = 1,
) -> None:
    """Add the summands of every query and `width` keys of a band, by the later of the two indices.

    Indices are counted from the first key of the band. In causal use the later index is the
    index of the query, and later keys hold zeros. Other calls have a single key in a group.
    """
    batch, rows, keys = band.sizes
    start(kernels.add_pairs_kernel, (max(keys, band.shift + rows),))(
        pairs, total, batch, rows, keys, band.shift, *pairs.stride()[:2],
        CAUSAL=problem.causal, WIDTH=width, K=128, **problem.gated(), num_warps=4,
    )  # fmt: skip
