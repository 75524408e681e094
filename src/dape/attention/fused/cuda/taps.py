"""Heads mixed by convolutions of three taps along the keys, in CUDA, for an fp16 scratch.

A warp computes all layers of a window of keys from the scores alone. Hidden units never pass
through memory.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused.cuda.launch import Kernel, kernel, source_of
from dape.attention.fused.geometry import ALIGNMENT, blocks
from dape.attention.fused.mixers import taps
from dape.attention.fused.mixers.mixed import Slots
from dape.attention.fused.mixers.mixer import Mixer
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Band, Problem
from dape.attention.fused.rows import Rows
from dape.attention.fused.sizes import cdiv, padded
from dape.attention.fused.sums import cleared
from dape.attention.fused.terms import Taps
from dape.attention.fused.windows import HEADS, ROWS, TAPS

# Neighbouring keys of a column, and windows in the ring of a warp.
TILES, STAGES = 8, 2
# Keys lost to the layers at each end of a window, and keys kept in the middle.
HALO = 4
OUT = 8 * TILES - 2 * HALO
# Blocks to fill a large GPU a few times over, resident blocks of each kernel on a multiprocessor,
# and the least rows of a segment of a diagonal.
BLOCKS, RESIDENT, SEGMENT = 528, {"taps_mix": 2, "taps_backward": 1, "taps_at_zero": 2}, 256
# Entries of C that a block of `taps_at_zero` makes, and its threads.
DISTANCES, THREADS = 32, 256


@dataclass(frozen=True, slots=True)
class CudaTapsMixer(Mixer[Taps]):
    """A mixer whose warps have a window of keys of one row each.

    Tile n of diagonal q has the rows 8 n + m for m < 8. Its windows begin with the key
    `base` - q OUT + 8 (n - 1). The blocks of the longest diagonals start first.
    `at_zero` is C with `W2 phi(U)`: of keys from the third on, of the first, and of the second.
    """

    at_zero: Float[Tensor, "3*heads distances"]

    @classmethod
    def of(cls, problem: Problem, terms: Taps) -> "CudaTapsMixer":
        """Return the mixer of a problem, with C."""
        heads, entries = terms.static.shape
        found = cls(problem, terms, terms.static.new_empty(3 * heads, entries))
        grid = (cdiv(entries, DISTANCES), 1, 1, THREADS, 1, 1)
        start(compiled("taps_at_zero", *found.macros()), grid)(
            found.at_zero, terms.weight_out, terms.hidden, terms.hidden_bias, terms.static, entries
        )
        return found

    @property
    def static(self) -> Tensor:
        """Return C, which logits of `mix` lack."""
        return self.at_zero

    def diagonals(self, band: Band) -> tuple[int, int, int]:
        """Return the first diagonal of a band, the number of diagonals, and `base`."""
        offset = self.problem.offset + HALO
        # A row has a hidden unit past its own index.
        first = -((offset % OUT + ROWS) // OUT)
        base = offset // OUT * OUT + band.rows.start
        last_tile = (band.sizes[1] - 1) // ROWS * ROWS
        return first, (base + last_tile + OUT - 1 - HALO) // OUT + 1 - first, base

    def mix(self, x: Tensor, band: Band) -> Tensor:
        """Return logits without C of a band from scores X, in a scratch of their own."""
        terms, logits = self.terms, torch.empty_like(x)
        first, number, base = self.diagonals(band)
        batch, rows, _ = band.sizes
        most = RESIDENT["taps_mix"] * BLOCKS // (number * batch)
        segments = max(1, min(16, rows // SEGMENT, most))
        grid = (batch, number, segments, 32 * ROWS, 1, 1)
        start(compiled("taps_mix", *self.macros()), grid)(
            x, logits, terms.weight_in, terms.weight_out, terms.hidden, terms.hidden_bias,
            rows, x.shape[2] * ALIGNMENT, len(terms.hidden), first, base,
            (self.problem.offset + HALO) % OUT, *x.stride()[:2],
        )  # fmt: skip
        return logits

    def mix_backward(
        self, x: Tensor, y: Tensor, band: Band, rows: Rows, slots: Slots
    ) -> tuple[Tensor, Tensor]:
        """Return P and dA of a band from scores X and Y, in scratches of their own."""
        terms, weights, grad = self.terms, torch.empty_like(x), torch.empty_like(x)
        first, number, base = self.diagonals(band)
        batch, count, _ = band.sizes
        grid = (cdiv(batch, slots.elements), number, slots.segments, 32 * ROWS, 1, 1)
        start(compiled("taps_backward", *self.macros()), grid)(
            x, y, weights, grad, terms.weight_in, terms.weight_out, terms.hidden,
            terms.hidden_bias, self.at_zero, rows.lse, *self.problem.gated().values(),
            slots.sums, batch, slots.elements, count, x.shape[2] * ALIGNMENT, len(terms.hidden),
            first, base, (self.problem.offset + HALO) % OUT, slots.sums.shape[1], int(slots.add),
            *x.stride()[:2], *rows.lse.stride(),
        )  # fmt: skip
        return weights, grad

    @property
    def lines(self) -> int:
        """Return the number of distances of a block."""
        return OUT + ROWS

    def slots(self) -> Slots:
        """Return room for the partial sums of all bands."""
        all_bands = blocks(self.problem)
        group, rows = all_bands[0].batch.stop, max(band.sizes[1] for band in all_bands)
        count = max(self.diagonals(band)[1] for band in all_bands)
        elements = min(group, cdiv(group * count, BLOCKS))
        segments = max(1, min(16, rows // SEGMENT, BLOCKS // (group * count)))
        sizes = taps.sizes_of(self.lines, TAPS, padded(len(self.terms.hidden_bias)), HEADS)
        shape = cdiv(group, elements) * segments, count, sum(sizes)
        add = len(all_bands) > 1
        sums = self.problem.query.new_empty(shape, dtype=torch.float32)
        return Slots(cleared(sums, self.problem) if add else sums, elements, segments, add)

    def gradients(self, slots: Slots, unit: Float[Tensor, ""], into: Taps) -> None:
        """Fill the gradients of C, U, W1, W2 and b1, times `unit`."""
        offset = (self.problem.offset + HALO) % OUT
        lowest = self.diagonals(blocks(self.problem)[0])[0] * OUT + offset - (OUT - 1)
        starts = lowest, lowest + TAPS // 2
        taps.add_slots(self.problem, slots.sums, self.lines, TAPS, starts, OUT, unit, into)

    def macros(self) -> tuple[int, ...]:
        """Return the macros of the sources, in the order of `NAMES`."""
        units, heads = len(self.terms.hidden_bias), self.terms.weight_in.shape[1]
        return heads, units, padded(units), TILES, ROWS, STAGES, ALIGNMENT


NAMES = ["H", "D", "UNITS", "TILES", "ROWS", "STAGES", "BLOCK"]


def shared_memory(name: str, units: int) -> int:
    """Return the bytes of shared memory of a kernel for a padded number of hidden units."""
    if name == "taps_at_zero":
        return 4 * (TAPS * HEADS * units + 2 * (DISTANCES + 2) * (units + 1))
    matrix, window = 2 * TAPS * HEADS * units, 2 * HEADS * 8 * TILES
    tables = 4 * 8 * (ROWS + TILES - 1) * (units + 8)
    if name == "taps_mix":
        return 3 * matrix + tables + ROWS * STAGES * window
    tables += 4 * 8 * (ROWS + TILES - 1) * HEADS
    sums = 4 * (8 * TILES * (units + HEADS) + 8 * units + 16 * HEADS)
    return 5 * matrix + tables + ROWS * max(2 * STAGES * window + sums, 4 * matrix)


def source(name: str, *values: int) -> str:
    """Return the source of the kernel of that name for these macros."""
    defines: dict[str, Any] = dict(zip(NAMES, values, strict=True))
    defines |= {"SHARED": shared_memory(name, defines["UNITS"]), "BLOCKS": RESIDENT[name]}
    if name == "taps_at_zero":
        return source_of(defines | {"DISTANCES": DISTANCES}, f"{name}.cu")
    if name == "taps_backward":
        defines["BACKWARD"] = 1
    return source_of(defines, "pairs.cuh", "taps.cuh", f"{name}.cu")


def compiled(name: str, *values: int) -> Kernel:
    """Return a named kernel for some macros, on the current device."""
    return compiled_on(torch.cuda.current_device(), name, *values)


@cache
def compiled_on(device: int, name: str, *values: int) -> Kernel:
    """Return a named kernel for some macros, on the current device, which must be `device`."""
    return kernel(source(name, *values), name, shared_memory=shared_memory(name, values[2]))
