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
from dape.attention.fused.sizes import cdiv, padded
from dape.attention.fused.sums import distances_at_once, slots_at_once, zeros
from dape.attention.fused.terms import Features

# A tile that fits the registers, and its padded number of lines.
TILE_ROWS, TILE_KEYS, LINES = 4, 16, 32
SIZES = ("H", "D", "F", "HEADS", "UNITS", "FEATURES")


class Slots(NamedTuple):
    """Partial sums of gradients: a slot for an element and a diagonal; `scale` is for all slots.

    A slot holds U `[1 + FEATURES, UNITS]`, C `[1 + FEATURES, HEADS]`, W1 `[HEADS, UNITS]`, W2
    likewise, v and c `[FEATURES]`, and psi `[lines]`.
    """

    sums: Float[Tensor, "group slots size"]
    scale: Float[Tensor, "indices"]


class FeaturesMixer(Mixer[Features]):
    """A mixer whose tables are over features."""

    __slots__ = ()

    def slots(self) -> Slots:
        """Return zeros for the blocks of the problem."""
        group, _, count = count_diagonals(self.problem, TILE_ROWS, TILE_KEYS, 0)
        units, heads = map(padded, self.terms.weight_in.shape)
        features = padded(len(self.terms.weight))
        size = (1 + features) * (units + heads) + 2 * heads * units + 2 * features + LINES
        scale = tuple(self.terms.scale.shape)
        return Slots(*zeros(self.problem.query, (group, count, size), scale))

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
            slots.sums[:, where.slot :], pairs,
            count, keys, len(self.terms.psi),
            where.first, where.band_tile, where.offset, *slots.sums.shape[1:],
            *x.stride()[:2], *rows.lse.stride(), mask.stride(0), *pairs.stride()[:2],
            LINES=LINES, **self.compiled(), num_warps=4, num_stages=1,
        )  # fmt: skip
        add_pairs(self.problem, slots.scale[band.keys.start :], pairs, band)
        return x, y

    def gradients(self, slots: Slots, unit: Float[Tensor, ""], into: Features) -> None:
        """Fill the gradients of C, U, W1, W2, and of the features, times `unit`."""
        group, count, size = slots.sums.shape
        distances, indices = len(into.psi), len(into.scale)
        at_once, entries = slots_at_once(group * count)
        lines, terms = distances_at_once(group, distances, 1, 1)
        programs = cdiv(size - LINES, entries) + cdiv(distances, lines) + cdiv(indices, entries)
        compiled = {name: self.compiled()[name] for name in SIZES}
        start(kernels.feature_gradients_kernel, (programs,))(
            *slots, unit, *into, group, count, count * size, size,
            lowest_distance(self.problem, TILE_ROWS, TILE_KEYS), TILE_KEYS, distances, indices,
            **compiled, LINES=LINES, SPANS=cdiv(LINES, TILE_KEYS), SLOTS=at_once, OUT=entries,
            DISTANCES=lines, TERMS=terms, **self.problem.gated(), num_warps=4,
        )  # fmt: skip

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
