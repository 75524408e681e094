"""Heads mixed by tables over the features of FIRE, in CUDA, for a scratch of two bytes.

Between the ends of its features FIRE is linear in x. Kernels have tables over such pieces, and sum
gradients over the pairs of a piece.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused import windows
from dape.attention.fused.cuda import mix
from dape.attention.fused.cuda.launch import Kernel, kernel, source_of
from dape.attention.fused.geometry import (
    ALIGNMENT,
    blocks,
    count_diagonals,
    diagonals,
    lowest_distance,
)
from dape.attention.fused.mixers.features import add_pairs
from dape.attention.fused.mixers.mixer import Mixer
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Band, Problem
from dape.attention.fused.rows import Rows
from dape.attention.fused.sizes import cdiv, padded
from dape.attention.fused.sums import add_up, cleared, fold
from dape.attention.fused.terms import Features
from dape.attention.fused.tiles import BLOCK

# Padded heads, and most units and features, whose accumulators fit the registers of a warp.
HEADS, MOST_UNITS, MOST_FEATURES = 16, 32, 32
# Threads of the kernels that make the tables: one for every head and unit.
THREADS = 64


def serves(problem: Problem, terms: Features) -> bool:
    """Return whether the kernels serve a problem, a causal one in 16 bits."""
    units, heads = terms.weight_in.shape
    rows, keys = problem.query.shape[2], problem.key.shape[2]
    return (
        problem.causal
        and problem.scratch == torch.float16
        and heads <= HEADS
        and units <= MOST_UNITS
        and len(terms.weight) <= MOST_FEATURES
        and rows >= windows.ROWS  # a step of decoding is faster in Triton
        and 0 <= problem.offset <= keys - rows
        and heads * keys * BLOCK.value < 2**31  # the least band, in offsets of 32 bits
        and windows.has_room()
    )


class Slots(NamedTuple):
    """Partial sums of gradients: a slot for some elements, a segment of a diagonal and a share.

    A slot holds the sums of pieces `[2 PIECES, HEADS + UNITS]`, W1 `[HEADS, UNITS]`, W2 likewise,
    and psi `[lines]`. `scale` is for all slots.
    """

    sums: Float[Tensor, "terms slots size"]
    scale: Float[Tensor, "indices"]
    elements: int
    segments: int
    add: bool


@dataclass(frozen=True, slots=True)
class CudaFeaturesMixer(Mixer[Features]):
    """A mixer whose blocks have some rows of a tile. `pieces` are the tables of the terms."""

    pieces: Float[Tensor, "size"]

    @classmethod
    def of(cls, problem: Problem, terms: Features) -> "CudaFeaturesMixer":
        """Return the mixer of a problem, with its tables."""
        sizes = padded(len(terms.weight_in)), padded(len(terms.weight))
        room = problem.query.new_empty(piece_tables(*sizes) // 4, dtype=torch.float32)
        mixer = cls(problem, terms, room)
        start(compiled("pieces", *mixer.macros()), (sizes[1] + 1, 1, 1, THREADS, 1, 1))(
            room, terms.hidden, terms.static, terms.weight, terms.bias
        )
        return mixer

    def mix(self, x: Tensor, band: Band) -> Tensor:
        """Return logits of a band, in place of scores X; -inf where unseen."""
        terms, mask = self.terms.part(band.keys), self.mask(x, band)
        where = diagonals(self.problem, band, mix.TILE, mix.TILE)
        batch, rows, keys = band.sizes
        _, segments = mix.CudaMixer.share(batch, where.number, rows)
        grid = (where.number, batch, mix.CudaMixer.shares * segments, 32 * mix.WARPS, 1, 1)
        start(compiled("features_mix", *self.macros()), grid)(
            x, terms.weight_in, terms.weight_out, self.pieces, terms.psi, terms.scale, mask,
            rows, keys, len(terms.psi), band.shift,
            where.first, where.band_tile, where.offset, *x.stride()[:2], mask.stride(0),
        )  # fmt: skip
        return x

    def sizes(self) -> list[int]:
        """Return how many numbers a slot holds of pieces, W1 and W2, and psi."""
        units, pieces = padded(len(self.terms.weight_in)), padded(len(self.terms.weight)) + 1
        return [2 * pieces * (HEADS + units), 2 * HEADS * units, mix.CudaMixer.lines]

    def slots(self) -> Slots:
        """Return room for the blocks of the problem."""
        problem = self.problem
        group, rows, count = count_diagonals(problem, mix.TILE, mix.TILE, 0)
        elements, segments = mix.CudaMixer.share(group, count, rows)
        shape = cdiv(group, elements) * segments, count * mix.CudaMixer.shares, sum(self.sizes())
        add = len(blocks(problem)) > 1
        sums = problem.query.new_empty(shape, dtype=torch.float32)
        scale = cleared(torch.empty_like(self.terms.scale))
        return Slots(cleared(sums) if add else sums, scale, elements, segments, add)

    def mix_backward(
        self, x: Tensor, y: Tensor, band: Band, rows: Rows, slots: Slots
    ) -> tuple[Tensor, Tensor]:
        """Return P and dA of a band in place of scores X and of Y; add to the slots."""
        terms, mask = self.terms.part(band.keys), self.mask(x, band)
        where = diagonals(self.problem, band, mix.TILE, mix.TILE)
        batch, count, keys = band.sizes
        pairs = x.new_empty(batch, count, cdiv(keys, mix.TILE), dtype=torch.float32)
        shares, groups = mix.CudaMixer.shares, len(slots.sums) // slots.segments
        grid = (where.number, groups, shares * slots.segments, 32 * mix.WARPS, 1, 1)
        start(compiled("features_backward", *self.macros()), grid)(
            x, y, terms.weight_in, terms.weight_out, self.pieces, terms.psi, terms.scale,
            rows.lse, mask, *self.problem.gated().values(),
            slots.sums[:, where.slot * shares :], pairs, batch, slots.elements,
            count, keys, len(terms.psi), band.shift,
            where.first, where.band_tile, where.offset, slots.sums.shape[1], int(slots.add),
            *x.stride()[:2], *rows.lse.stride(), mask.stride(0), *pairs.stride()[:2],
        )  # fmt: skip
        add_pairs(self.problem, slots.scale[band.keys.start :], pairs, band, mix.TILE)
        return x, y

    def gradients(self, slots: Slots, unit: Float[Tensor, ""], into: Features) -> None:
        """Fill the gradients of C, U, W1, W2, and of the features, times `unit`."""
        problem, terms = self.problem, self.terms
        units, pieces = padded(len(terms.weight_in)), padded(len(terms.weight)) + 1
        by_piece, weights, psi = slots.sums.split(self.sizes(), dim=2)
        first = lowest_distance(problem, mix.TILE, mix.TILE)
        step = mix.TILE // mix.CudaMixer.shares
        fold(problem, psi[..., None], first, step, unit, into.psi[:, None])
        add_up(problem, slots.scale[None, None], (len(into.scale), 1), unit, into.scale[:, None])
        total = slots.sums.new_empty(2 * pieces, HEADS + units)
        add_up(problem, by_piece, total.shape, unit, total)
        grid = (len(terms.weight) + 1, 1, 1, THREADS, 1, 1)
        start(compiled("pieces_backward", *self.macros()), grid)(
            total, terms.hidden, terms.static, terms.weight, terms.bias,
            *problem.gated().values(), into.hidden, into.static, into.weight, into.bias,
        )  # fmt: skip
        if len(into.weight_in):
            add_up(problem, weights, (HEADS, units), unit, into.weight_in.t(), into.weight_out)

    def macros(self) -> tuple[int, ...]:
        """Return the constants of the compiled sources, in the order of `NAMES`."""
        (units, heads), features = self.terms.weight_in.shape, len(self.terms.weight)
        masked = int(self.problem.mask is not None)
        return heads, units, features, padded(units), padded(features), masked


NAMES = ["H", "D", "F", "UNITS", "FEATURES", "MASKED"]


def piece_tables(units: int, features: int) -> int:
    """Return the bytes of the tables over pieces, for padded numbers of units and features."""
    pieces, channels = features + 1, HEADS + units
    return 4 * (pieces + 3) + pieces * (8 * channels + 2 * channels + 16)


def shared_memory(name: str, units: int, features: int) -> int:
    """Return the bytes of shared memory of a kernel for padded numbers of units and features."""
    pieces, channels = features + 1, HEADS + units
    if name.startswith("pieces"):
        return 4 * (5 * features + pieces + 1 + 2 * channels)
    matrix, tile, line = 2 * HEADS * units, 2 * HEADS * mix.TILE, 16 * mix.TILE
    tables = piece_tables(units, features)
    if name == "features_mix":
        return tables + 3 * matrix + mix.WARPS * (line + mix.STAGES * (tile + 16))
    ring, sums = mix.STAGES * (2 * tile + 4 * HEADS + 16), 4 * (2 * HEADS * units + mix.TILE)
    return tables + 5 * matrix + mix.WARPS * (line + 8 * pieces * channels + max(ring, sums))


def source(name: str, *values: int) -> str:
    """Return the source of a named kernel for some macros."""
    defines = dict(zip(NAMES, values, strict=True))
    sizes = defines["UNITS"], defines["FEATURES"]
    defines |= {"HEADS": HEADS, "CAUSAL": 1, "ROWS": mix.TILE, "KEYS": mix.TILE}
    defines |= {"WARPS": mix.WARPS, "STAGES": mix.STAGES, "BLOCK": ALIGNMENT}
    defines |= {"SHARED": shared_memory(name, *sizes), "BLOCKS": mix.RESIDENT}
    shared: tuple[str, ...] = () if name.startswith("pieces") else ("features.cuh",)
    if name == "features_backward":
        defines["BACKWARD"] = 1
        shared = *shared, "features_slots.cuh"
    return source_of(defines, "pairs.cuh", "tile.cuh", "pieces.cuh", *shared, f"{name}.cu")


def compiled(name: str, *values: int) -> Kernel:
    """Return a named kernel for some macros, on the current device."""
    return compiled_on(torch.cuda.current_device(), name, *values)


@cache
def compiled_on(device: int, name: str, *values: int) -> Kernel:
    """Return a named kernel for some macros, on the current device, which must be `device`."""
    return kernel(source(name, *values), name, shared_memory=shared_memory(name, *values[3:5]))
