"""The kernels across heads for FIRE, in Triton: `Features`, and `Mixing` over them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused import fire, mix_triton
from dape.attention.fused.geometry import (
    Band,
    Features,
    Mixing,
    Problem,
    diagonals,
    next_power_of_2,
)
from dape.attention.fused.mix_triton import lines, shares, tile_keys, tile_rows, walk, whole
from dape.attention.fused.slots import Walker, add_up, fold, lowest, padded, slots_of, zeros

__all__ = [
    "Slots",
    "lines",
    "mix",
    "mix_backward",
    "share",
    "shares",
    "tile_keys",
    "tile_rows",
    "walk",
    "whole",
]


def share(batch: int, diagonals: int, rows: int) -> tuple[int, int]:
    """Return that a program takes one element, and that diagonals are not cut."""
    return 1, 1


def mix(x: Tensor, band: Band, problem: Problem, mixing: Mixing) -> None:
    """Turn the scores X of a band into logits, in place; -inf where unseen."""
    where = diagonals(problem, band, tile_rows, tile_keys)
    mask = x if problem.mask is None else problem.mask[band.batch, band.keys]
    batch, rows, keys = band.sizes
    features = features_of(problem, band)
    fire.fire_mix_kernel[(where.number, batch)](
        x, mixing.weight_in, mixing.weight_out, mixing.hidden, mixing.static, *features, mask,
        rows, keys, len(features.psi),
        where.first, where.band_tile, where.offset, *x.stride()[:2], mask.stride(0),
        **sizes(problem, mixing), **problem.gated(), num_warps=4,
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
    """Return P and dA of a band in place of scores X and dP in Y; add to the slots."""
    where = diagonals(problem, band, tile_rows, tile_keys)
    mask = x if problem.mask is None else problem.mask[band.batch, band.keys]
    features = features_of(problem, band)
    batch, rows, keys = band.sizes
    pairs = x.new_empty(batch, rows, keys, dtype=torch.float32)
    fire.fire_mix_backward_kernel[(where.number, batch)](
        x, y, mixing.weight_in, mixing.weight_out, mixing.hidden, mixing.static, *features,
        lse, delta, mask, *(sums[:, where.slot :] for sums in slots[:-1]), pairs,
        rows, keys, len(features.psi),
        where.first, where.band_tile, where.offset, slots.psi.shape[1],
        *x.stride()[:2], *lse.stride(), mask.stride(0), *pairs.stride()[:2],
        LINES=lines, **sizes(problem, mixing), **problem.gated(), num_warps=8, num_stages=1,
    )  # fmt: skip
    add_pairs(slots.scale[band.keys.start :], pairs, band, problem)
    return x, y


def add_pairs(
    total: Float[Tensor, "indices"],
    pairs: Float[Tensor, "batch rows keys"],
    band: Band,
    problem: Problem,
) -> None:
    """Add what each query and key of a band have for the later of their indices.

    Indices are counted from the first key of the band. In causal use the later is the query's, and
    what stands at later keys is nothing.
    """
    batch, rows, keys = band.sizes
    fire.add_pairs_kernel[(max(keys, band.shift + rows),)](
        pairs, total, batch, rows, keys, band.shift, *pairs.stride()[:2],
        CAUSAL=problem.causal, K=128, **problem.gated(), num_warps=4,
    )  # fmt: skip


class Slots(NamedTuple):
    """Where each diagonal of each element of a group sums its gradients; `scale` is for all."""

    weight_in: Float[Tensor, "group slots UNITS HEADS"]
    weight_out: Float[Tensor, "group slots HEADS UNITS"]
    hidden: Float[Tensor, "group slots 1+FEATURES UNITS"]
    static: Float[Tensor, "group slots 1+FEATURES HEADS"]
    psi: Float[Tensor, "group slots lines"]
    weight: Float[Tensor, "group slots FEATURES"]
    bias: Float[Tensor, "group slots FEATURES"]
    scale: Float[Tensor, "distances"]

    @classmethod
    def of(cls, problem: Problem, mixing: Mixing, mixer: Walker) -> "Slots":
        """Return zeros for the bands of a problem."""
        group, count = slots_of(problem, mixer)
        units, heads, features = (sizes(problem, mixing)[x] for x in ("UNITS", "HEADS", "FEATURES"))

        shapes = (
            *((units, heads), (heads, units), (1 + features, units), (1 + features, heads)),
            *((lines,), (features,), (features,)),
        )
        lead = group, count
        scale = features_of(problem).scale
        found = zeros(problem.query, *((*lead, *x) for x in shapes), tuple(scale.shape))
        return cls(*found)

    def gradients(
        self,
        problem: Problem,
        mixing: Mixing,
        mixer: Walker,
        unit: Float[Tensor, ""],
        tables: Sequence[Tensor],
    ) -> None:
        """Fill the gradients of C, U, W1, W2, and of the features, times `unit`."""
        static, hidden, weight_in, weight_out, psi, scale, weight, bias = tables
        units, heads = padded(mixing)
        place = lowest(problem, tile_rows, tile_keys), tile_keys
        fold(problem, self.psi[..., None], *place, unit, psi[:, None])
        add_up(problem, self.static, self.static.shape[2:], unit, static.t())
        add_up(problem, self.scale[None, None], (len(scale), 1), unit, scale[:, None])
        for slots, table in ((self.weight, weight), (self.bias, bias)):
            add_up(problem, slots, (slots.shape[2], 1), unit, table[:, None])
        if len(weight_in):
            add_up(problem, self.hidden, self.hidden.shape[2:], unit, hidden)
            add_up(problem, self.weight_in, (units, heads), unit, weight_in)
            add_up(problem, self.weight_out, (heads, units), unit, weight_out)


def features_of(problem: Problem, band: Band | None = None) -> Features:
    """Return the features of a problem of FIRE, slots from the first key of a band if given.

    Other problems have another mixer.
    """
    assert problem.features is not None
    first = 0 if band is None else band.keys.start
    return problem.features._replace(scale=problem.features.scale[first:])


def sizes(problem: Problem, mixing: Mixing) -> dict[str, Any]:
    """Return the compile-time arguments: counts, padded, and switches."""
    features = len(features_of(problem).weight)
    return {
        **mix_triton.sizes(problem, mixing),
        "F": features,
        "FEATURES": max(16, next_power_of_2(features)),
    }
