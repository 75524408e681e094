"""The backward pass across heads as one kernel, for Hopper; compiled by NVRTC."""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused import sums_kernels as kernels
from dape.attention.fused.cuda.forward import CAPABILITY, aligned, padded_units
from dape.attention.fused.cuda.launch import Kernel, kernel, source_of
from dape.attention.fused.cuda.mix import CudaMixer
from dape.attention.fused.geometry import ALIGNMENT, blocks
from dape.attention.fused.mixers.mixer import Mixer
from dape.attention.fused.problem import Band, Problem, Result
from dape.attention.fused.rows import Rows
from dape.attention.fused.sizes import cdiv, next_power_of_2, strides
from dape.attention.fused.sums import add_up
from dape.attention.fused.terms import Mixed

HEADS, MOST_UNITS, WIDEST_HEAD, KEYS = 16, 64, 128, 32
# What a block may have on a GPU of this capability.
REGISTERS, SHARED_MEMORY = 65536, 227 * 1024
# Blocks for each multiprocessor, and the tiles of keys that are worth the start of one.
SHARE, LEAST = 5, 16


class Layout(NamedTuple):
    """What the source is compiled for: rows of a tile, what a head's warp and a mixer have."""

    rows: int
    mixers: int
    one_stage: int
    head_registers: int
    mixer_registers: int
    shared_memory: int


def layout(heads: int, head_dim: int, units: int) -> Layout | None:
    """Return the layout for a block that holds all heads, or None where none fits."""
    if heads > HEADS or units > MOST_UNITS or head_dim > WIDEST_HEAD or head_dim % 16:
        return None
    kinds = [(16, 8), (32, 4), (16, 4)]
    for rows, mixers in kinds if head_dim <= 64 else kinds[2:]:
        registers = registers_of(heads, rows * head_dim, units, mixers)
        for one_stage in (0, 1):
            size = shared_memory(heads, head_dim, units, rows, mixers, one_stage)
            if registers is not None and size <= SHARED_MEMORY:
                return Layout(rows, mixers, one_stage, *registers, size)
    return None


def registers_of(heads: int, numbers: int, units: int, mixers: int) -> tuple[int, int] | None:
    """Return the registers of a head's thread and a mixer's; (0, 0) if a block may start with them.

    A head holds so many `numbers` of Q, and as many of dO.
    """
    head_threads, mixer_threads = 32 * 4 * cdiv(heads, 4), 32 * mixers
    launched = min(255, REGISTERS // (head_threads + mixer_threads) // 8 * 8)
    head, mixer = 40 + numbers // 32, 192 if units <= 32 else 232
    if mixers == 8:
        head, mixer = 24 + numbers // 32, 152 if units <= 32 else 232
    if launched >= max(head, mixer):
        return 0, 0
    # A block's threads share what it started with; one that waits for more would wait for ever.
    pool = launched * (head_threads + mixer_threads)
    left = (pool - head_threads * head) // mixer_threads // 8 * 8
    return (head, min(left, 240)) if left >= mixer and head <= launched else None


def shared_memory(
    heads: int, head_dim: int, units: int, rows: int, mixers: int, one_stage: int
) -> int:
    """Return the bytes of shared memory of a block."""
    lines = heads * KEYS * head_dim * 2 * (1 if one_stage else 2)
    scores = 4 * heads * (rows * KEYS + 8) * 2
    tables = 2 * (rows + KEYS) * (2 * units + 4 * HEADS) + 4 * rows * HEADS
    parts = 16 * mixers // 4 * 5 * (units + HEADS)
    never = 2 * HEADS * (2 if units <= 32 and mixers == 4 else 1)
    return cdiv(lines + scores + tables + 4 * (parts + never) + 144, 16) * 16


def layout_of(problem: Problem, terms: Mixed) -> Layout | None:
    """Return the layout for a problem, or None if this kernel does not serve it."""
    query, value = problem.query, problem.value
    served = (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device) == CAPABILITY
        and problem.scratch == torch.float16
        and value.element_size() == 2
        and query.shape[3] == value.shape[3]
    )
    return layout(query.shape[1], query.shape[3], padded_units(terms)) if served else None


class Walk(NamedTuple):
    """One backward pass: tables as the kernel reads them, and where its blocks leave their sums.

    `sums` are those of the distances of one band. `static` and `hidden` are the gradients of C and
    U, and `weights` those of W1 and W2 by block, of all bands.
    """

    where: Layout
    packed_hidden: Float[Tensor, "distances units"]
    packed_static: Float[Tensor, "distances heads"]
    low: int
    sums: Float[Tensor, "numbers"]
    static: Float[Tensor, "heads distances"]
    hidden: Float[Tensor, "distances hidden"]
    weights: Float[Tensor, "1 blocks size"]


class WholeMixer(Mixer[Mixed]):
    """A mixer that makes scores and dO V^T itself in the backward pass."""

    __slots__ = ()
    makes_scores = True

    def whole(self, found: Result) -> bool:
        """Fill a result by one kernel; return whether there is one for the problem."""
        return CudaMixer(self.problem, self.terms).whole(found)

    def mix(self, x: Tensor, band: Band) -> None:
        """Turn the scores X of a band into logits without C, in place; -inf where unseen."""
        CudaMixer(self.problem, self.terms).mix(x, band)

    def slots(self) -> Walk:
        """Return room for the bands of the problem, and the tables, packed."""
        problem, terms = self.problem, self.terms
        where = layout_of(problem, terms)
        assert where is not None, "passes.mixer_of takes this mixer where there is a layout"
        rows, keys, units = problem.query.shape[2], problem.key.shape[2], padded_units(terms)
        low = min(0, problem.offset) - cdiv(keys, KEYS) * KEYS
        distances = cdiv(rows, where.rows) * where.rows + max(0, problem.offset) + 1 - low
        new = terms.static.new_empty
        hidden, static = new(distances, units, dtype=torch.float16), new(distances, HEADS)
        compiled(static.device.index, "pack_backward", *macros(problem, terms, where))(
            grid=(min(cdiv(distances * (units + HEADS), 256), 2048), 1, 1),
            block=(256, 1, 1),
            args=[terms.hidden, terms.static, hidden, static, len(terms.hidden), low, distances],
        )
        cuts = [Cut.of(problem, band, where) for band in blocks(problem)]
        size = max(cut.blocks * (cut.span + 1) for cut in cuts) * KEYS * (units + HEADS)
        most = max(cut.blocks for cut in cuts)
        sums = new(size), torch.empty_like(terms.static), torch.empty_like(terms.hidden)
        weights = terms.static.new_zeros(1, most, 2 * HEADS * units)
        return Walk(where, hidden, static, low, *sums, weights)

    def mix_backward(
        self, x: Tensor, y: Tensor, band: Band, rows: Rows, slots: Walk
    ) -> tuple[Tensor, Tensor]:
        """Return P and dA of a band in X and Y, whatever they hold; add to the slots."""
        terms, part = self.terms, self.problem.part(band)
        cut, mask = Cut.of(self.problem, band, slots.where), self.mask(x, band)
        query, key, value = map(aligned, (part.query, part.key, part.value))
        grad, given = aligned(rows.grad_out), part._replace(query=query, key=key, value=value)
        batch, count, keys = band.sizes
        compiled(x.device.index, "backward", *macros(given, terms, slots.where))(
            grid=(cut.row_tiles * cut.parts, batch, 1),
            block=(32 * (cdiv(query.shape[1], 4) * 4 + slots.where.mixers), 1, 1),
            args=[
                query, key, grad, value, x, y, rows.lse, rows.delta,
                terms.weight_in, terms.weight_out, slots.packed_hidden, slots.packed_static,
                mask, rows.unit, *self.problem.gated().values(), slots.sums, slots.weights,
                count, keys, cut.row_tiles, cut.span, band.shift, slots.low,
                float(self.problem.scale), *strides(query), *key.stride()[:2], *strides(grad),
                *value.stride()[:2], *x.stride()[:2], *rows.lse.stride(), mask.stride(0),
            ],
        )  # fmt: skip
        self.add_distances(cut, band, slots)
        return x, y

    def add_distances(self, cut: "Cut", band: Band, slots: Walk) -> None:
        """Add the sums of a band by distance to the gradients of C and U."""
        heads, distances = slots.static.shape
        batch, rows, keys = band.sizes
        units = padded_units(self.terms)
        kernels.distances_kernel[(distances,)](
            slots.sums, slots.static, slots.hidden, batch, cut.row_tiles, cut.parts, cut.span,
            rows, keys, band.shift, distances,
            H=heads, D=slots.hidden.shape[1], UNITS=units, COLUMNS=units + HEADS,
            WIDE=next_power_of_2(units + HEADS), CAUSAL=self.problem.causal,
            ADD=band != blocks(self.problem)[0], M=slots.where.rows, K=KEYS, TERMS=16,
            **self.problem.gated(), num_warps=4,
        )  # fmt: skip

    def gradients(self, slots: Walk, unit: Float[Tensor, ""], into: Mixed) -> None:
        """Fill the gradients of C, U, W1 and W2, times `unit`.

        What goes to C and U is of no use where the gate says so, and the wide way fills them then.
        """
        torch.mul(slots.static, unit, out=into.static)
        torch.mul(slots.hidden, unit, out=into.hidden)
        padded = HEADS, padded_units(self.terms)
        weights = into.weight_in.t(), into.weight_out
        add_up(self.problem, slots.weights, padded, unit, *weights)


class Cut(NamedTuple):
    """How a band is cut for the blocks of a launch: tiles of rows, and parts of `span` tiles."""

    blocks: int
    row_tiles: int
    parts: int
    span: int

    @classmethod
    def of(cls, problem: Problem, band: Band, where: Layout) -> "Cut":
        """Return a cut that has a few blocks for each multiprocessor of a large GPU."""
        batch, rows, keys = band.sizes
        row_tiles, tiles = cdiv(rows, where.rows), cdiv(keys, KEYS)
        mean = tiles
        if problem.causal:
            seen = (min(keys, max(0, row + band.shift)) for row in (where.rows, rows))
            mean = cdiv(sum(seen), 2 * KEYS)
        span = min(tiles, max(LEAST, batch * row_tiles * mean // (SHARE * PROCESSORS)))
        parts = cdiv(tiles, cdiv(span, 2) * 2)
        return cls(batch * row_tiles * parts, row_tiles, parts, cdiv(span, 2) * 2)


PROCESSORS = 132  # of an H100
NAMES = (
    *("H", "D", "UNITS", "E", "GROUP", "K_T", "V_T", "CAUSAL", "MASKED", "BF16", "BLOCK"),
    *("ROWS", "MIXERS", "ONE_STAGE", "HEAD_REGISTERS", "MIXER_REGISTERS", "SHARED"),
)


def macros(problem: Problem, terms: Mixed, where: Layout) -> tuple[int, ...]:
    """Return what the source is compiled for, in the order of `NAMES`."""
    query, key, value = problem.query, problem.key, problem.value
    switches = problem.causal, problem.mask is not None, value.dtype == torch.bfloat16
    return (
        query.shape[1], len(terms.weight_in), padded_units(terms), query.shape[3],
        query.shape[1] // key.shape[1], key.stride(2), value.stride(2), *map(int, switches),
        ALIGNMENT, *where,
    )  # fmt: skip


PHASES = ("lines.cuh", "backward_heads.cuh", "backward_mixers.cuh")


def source(name: str, *values: int) -> str:
    """Return the source of the kernel of that name for these macros."""
    phases = PHASES if name == "backward" else ()
    defines = dict(zip(NAMES, values, strict=True))
    return source_of(defines, "warps.cuh", "backward.cuh", *phases, f"{name}.cu")


@cache
def compiled(device: int, name: str, *values: int) -> Kernel:
    """Return the kernel of that name for these macros, on the current device, which is `device`."""
    shared = values[-1] if name == "backward" else 0
    return kernel(source(name, *values), name, capability="90a", shared_memory=shared)
