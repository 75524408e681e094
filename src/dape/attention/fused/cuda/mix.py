"""Heads mixed by tables over the distance, in CUDA, for a scratch of two bytes."""

from functools import cache

import torch
from torch import Tensor

from dape.attention.fused.cuda import forward
from dape.attention.fused.cuda.launch import Kernel, kernel, source_of
from dape.attention.fused.geometry import ALIGNMENT, diagonals
from dape.attention.fused.mixers.mixed import MixedMixer, Slots
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Band, Result
from dape.attention.fused.rows import Rows
from dape.attention.fused.sizes import padded

# Rows of a tile, and keys.
TILE = 32
# Rows of a tile in a block, blocks that fill a large GPU a few times over, blocks that a
# multiprocessor holds, and the fewest rows of a segment.
WARPS, BLOCKS, RESIDENT, ROWS = 4, 1024, 2, 256
# Tiles of a warp under way or in work.
STAGES = 3
# Most padded weights of a layer whose accumulators fit the registers of a warp.
MOST_WEIGHTS = 1024


def obstacle(heads: int, units: int) -> str | None:
    """Return why the kernels do not serve a number of heads and hidden units, or None."""
    if padded(heads) * padded(units) <= MOST_WEIGHTS:
        return None
    return f"{heads} heads with hidden={units}: at most 32 heads with 32 units, or 16 with 64"


class CudaMixer(MixedMixer):
    """A mixer whose blocks have some rows of a tile."""

    __slots__ = ()
    tile_rows = tile_keys = TILE
    lines, shares = WARPS + TILE, TILE // WARPS

    @staticmethod
    def share(batch: int, diagonals: int, rows: int) -> tuple[int, int]:
        """Return how many elements a block takes, and into how many segments to cut a diagonal."""
        blocks = TILE // WARPS * max(1, diagonals)
        elements = max(1, min(batch, batch * blocks // BLOCKS))
        return elements, max(1, min(16, rows // ROWS, BLOCKS // (batch * blocks)))

    def whole(self, found: Result) -> bool:
        """Fill a result and its flag by one kernel, if it serves the problem; return whether."""
        where = forward.layout_of(self.problem, self.terms)
        if where is not None:
            forward.forward(self.problem, self.terms, where, found)
        return where is not None

    def mix(self, x: Tensor, band: Band) -> Tensor:
        """Return logits without C of a band, in place of scores X; -inf where unseen."""
        terms, mask = self.terms, self.mask(x, band)
        where = diagonals(self.problem, band, TILE, TILE)
        batch, rows, keys = band.sizes
        _, segments = self.share(batch, where.number, rows)
        grid = (where.number, batch, self.shares * segments, 32 * WARPS, 1, 1)
        start(compiled("mix", *self.macros()), grid)(
            x, terms.weight_in, terms.weight_out, terms.hidden, mask,
            rows, keys, len(terms.hidden),
            where.first, where.band_tile, where.offset, *x.stride()[:2], mask.stride(0),
        )  # fmt: skip
        return x

    def mix_backward(
        self, x: Tensor, y: Tensor, band: Band, rows: Rows, slots: Slots
    ) -> tuple[Tensor, Tensor]:
        """Return P and dA of a band in place of scores X and of Y; add to the slots."""
        terms, mask = self.terms, self.mask(x, band)
        where = diagonals(self.problem, band, TILE, TILE)
        batch, count, keys = band.sizes
        groups = len(slots.sums) // slots.segments
        grid = (where.number, groups, self.shares * slots.segments, 32 * WARPS, 1, 1)
        start(compiled("mix_backward", *self.macros()), grid)(
            x, y, terms.weight_in, terms.weight_out, terms.hidden, terms.static,
            rows.lse, mask, *self.problem.gated().values(),
            slots.sums[:, where.slot * self.shares :], batch, slots.elements,
            count, keys, len(terms.hidden), where.first, where.band_tile, where.offset,
            *slots.sums.shape[1:], int(slots.add),
            *x.stride()[:2], *rows.lse.stride(), mask.stride(0),
        )  # fmt: skip
        return x, y

    def macros(self) -> tuple[int, ...]:
        """Return the constants of the compiled source, in the order of `NAMES`."""
        units, heads = self.terms.weight_in.shape
        switches = int(self.problem.causal), int(self.problem.mask is not None)
        sizes = TILE, TILE, WARPS, STAGES, ALIGNMENT
        return heads, units, padded(heads), padded(units), *switches, *sizes


NAMES = ["H", "D", "HEADS", "UNITS", "CAUSAL", "MASKED", "ROWS", "KEYS", "WARPS", "STAGES", "BLOCK"]


def shared_memory(name: str, heads: int, units: int) -> int:
    """Return the bytes of shared memory of a kernel for padded numbers of heads and units."""
    matrix, tile, hidden = 2 * heads * units, 2 * heads * TILE, 2 * TILE * units
    if name == "mix":
        return 2 * matrix + WARPS * (hidden + STAGES * tile)
    walk = hidden + 4 * TILE * heads + STAGES * (2 * tile + 4 * heads)
    sums = 4 * (TILE * (units + heads) + 2 * heads * units)
    return 4 * matrix + WARPS * max(walk, sums)


def source(name: str, *values: int) -> str:
    """Return the source of a named kernel for some macros."""
    defines = dict(zip(NAMES, values, strict=True))
    defines["SHARED"] = shared_memory(name, defines["HEADS"], defines["UNITS"])
    if name == "mix_backward":
        defines |= {"BACKWARD": 1, "BLOCKS": RESIDENT}
    return source_of(defines, "pairs.cuh", "tile.cuh", "mix.cuh", f"{name}.cu")


def compiled(name: str, *values: int) -> Kernel:
    """Return a named kernel for some macros, on the current device."""
    return compiled_on(torch.cuda.current_device(), name, *values)


@cache
def compiled_on(device: int, name: str, *values: int) -> Kernel:
    """Return a named kernel for some macros, on the current device, which must be `device`."""
    size = shared_memory(name, *values[2:4])
    return kernel(source(name, *values), name, shared_memory=size)
