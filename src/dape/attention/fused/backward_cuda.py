"""The backward pass across heads as one kernel, for Hopper; compiled by NVRTC."""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused import backward_kernels as kernels
from dape.attention.fused.forward_cuda import CAPABILITY, aligned, padded_units
from dape.attention.fused.geometry import (
    ALIGNMENT,
    Band,
    Mixing,
    Problem,
    blocks,
    cdiv,
    next_power_of_2,
    strides,
)
from dape.attention.fused.launch import Kernel, kernel, source_of
from dape.attention.fused.slots import add_up

HEADS, MOST_UNITS, WIDEST_HEAD, KEYS, MIXERS = 16, 64, 128, 32, 4
# What a block may have on a GPU of this capability.
REGISTERS, SHARED_MEMORY = 65536, 227 * 1024
# Blocks for each multiprocessor, and the tiles of keys that are worth the start of one.
SHARE, LEAST = 5, 16


class Layout(NamedTuple):
    """What the source is compiled for: rows of a tile, what a head's warp and a mixer have."""

    rows: int
    one_stage: int
    head_registers: int
    mixer_registers: int
    shared_memory: int


def layout(heads: int, head_dim: int, units: int) -> Layout | None:
    """Return the layout for a block that holds all heads, or None where none fits."""
    if heads > HEADS or units > MOST_UNITS or head_dim > WIDEST_HEAD or head_dim % 16:
        return None
    for rows in (32, 16) if head_dim <= 64 else (16,):
        registers = registers_of(heads, rows * head_dim, units)
        for one_stage in (0, 1):
            size = shared_memory(heads, head_dim, units, rows, one_stage)
            if registers is not None and size <= SHARED_MEMORY:
                return Layout(rows, one_stage, *registers, size)
    return None


def registers_of(heads: int, numbers: int, units: int) -> tuple[int, int] | None:
    """Return the registers of a head's thread and a mixer's; (0, 0) if a block may start with them.

    A head holds so many `numbers` of Q, and as many of dO.
    """
    head_threads, mixer_threads = 32 * 4 * cdiv(heads, 4), 32 * MIXERS
    launched = min(255, REGISTERS // (head_threads + mixer_threads) // 8 * 8)
    head, mixer = 40 + numbers // 32, 192 if units <= 32 else 232
    if launched >= max(head, mixer):
        return 0, 0
    # A block's threads share what it started with; one that waits for more would wait for ever.
    pool = launched * (head_threads + mixer_threads)
    left = (pool - head_threads * head) // mixer_threads // 8 * 8
    return (head, min(left, 240)) if left >= mixer and head <= launched else None


def shared_memory(heads: int, head_dim: int, units: int, rows: int, one_stage: int) -> int:
    """Return the bytes of shared memory of a block."""
    lines = heads * KEYS * head_dim * 2 * (1 if one_stage else 2)
    scores = 4 * heads * (rows * KEYS + 8) * 2
    tables = 2 * (rows + KEYS) * (2 * units + 4 * HEADS) + 4 * rows * HEADS
    parts, never = 16 * (MIXERS + 1) * (units + HEADS), 2 * HEADS * (2 if units <= 32 else 1)
    size = lines + scores + tables + 4 * (parts + never) + 144
    return cdiv(size, 16) * 16


def layout_of(problem: Problem, mixing: Mixing) -> Layout | None:
    """Return the layout for a problem, or None if this kernel does not serve it."""
    query, value = problem.query, problem.value
    served = (
        torch.cuda.get_device_capability(query.device) == CAPABILITY
        and problem.tabled
        and problem.scratch == torch.float16
        and value.element_size() == 2
        and query.shape[3] == value.shape[3]
    )
    return layout(query.shape[1], query.shape[3], padded_units(mixing)) if served else None


class Walk(NamedTuple):
    """One backward pass: tables as the kernel reads them, and where its blocks leave their sums.

    `sums` are those of the distances of one band, `weights` the gradients of W1 and W2 of all.
    """

    where: Layout
    hidden: Tensor
    fixed: Tensor
    low: int
    sums: Float[Tensor, "numbers"]
    weights: Float[Tensor, "1 blocks size"]

    @classmethod
    def of(cls, problem: Problem, mixing: Mixing, where: Layout) -> "Walk":
        """Return room for the bands of a problem, and its tables."""
        rows, keys, units = problem.query.shape[2], problem.key.shape[2], padded_units(mixing)
        low = min(0, problem.offset) - cdiv(keys, KEYS) * KEYS
        distances = cdiv(rows, where.rows) * where.rows + max(0, problem.offset) + 1 - low
        new = mixing.static.new_empty
        hidden = new(distances, units, dtype=torch.float16)
        fixed = new(distances, HEADS)
        compiled(fixed.device.index, "pack", *macros(problem, mixing, where))(
            grid=(min(cdiv(distances * (units + HEADS), 256), 2048), 1, 1),
            block=(256, 1, 1),
            args=[
                mixing.hidden, mixing.static, hidden, fixed, mixing.hidden.shape[0], low, distances,
            ],
        )  # fmt: skip
        places = [Cut.of(problem, band, where) for band in blocks(problem)]
        size = max(cut.blocks * (cut.span + 1) for cut in places) * KEYS * (units + HEADS)
        most = max(cut.blocks for cut in places)
        weights = mixing.static.new_zeros(1, most, 2 * HEADS * units)
        return cls(where, hidden, fixed, low, new(size), weights)

    def band(
        self,
        x: Tensor,
        y: Tensor,
        band: Band,
        problem: Problem,
        mixing: Mixing,
        lse: Tensor,
        delta: Tensor,
        grad_out: Tensor,
        unit: Tensor,
        tables: list[Tensor],
    ) -> None:
        """Fill P in X and dA in Y of a band; add to the gradients of C and U, the first of them."""
        where, part, cut = self.where, problem.part(band), Cut.of(problem, band, self.where)
        part = part._replace(
            query=aligned(part.query[:, :, band.rows]),
            key=aligned(part.key),
            value=aligned(part.value),
        )
        query, key, value, grad = part.query, part.key, part.value, aligned(grad_out)
        batch, rows, keys = band.sizes
        mask = x if part.mask is None else part.mask
        threads = 32 * (cdiv(query.shape[1], 4) * 4 + MIXERS)
        compiled(x.device.index, "backward", *macros(part, mixing, where))(
            grid=(cut.row_tiles * cut.parts, batch, 1),
            block=(threads, 1, 1),
            args=[
                query, key, grad, value, x, y, lse, delta, mixing.weight_in, mixing.weight_out,
                self.hidden, self.fixed, mask, unit, *problem.gated().values(),
                self.sums, self.weights, rows, keys, cut.row_tiles, cut.span, band.shift, self.low,
                float(problem.scale), *strides(query), *key.stride()[:2], *strides(grad),
                *value.stride()[:2], *x.stride()[:2], *lse.stride(), mask.stride(0),
            ],
        )  # fmt: skip
        static, hidden = tables[:2]
        (count, units), heads = hidden.shape, len(static)
        padded = padded_units(mixing)
        columns = padded + HEADS
        kernels.distances_kernel[(count,)](
            self.sums, unit, static, hidden, batch, cut.row_tiles, cut.parts, cut.span,
            rows, keys, band.shift, count,
            H=heads, D=units, UNITS=padded, COLUMNS=columns, WIDE=next_power_of_2(columns),
            CAUSAL=problem.causal, ADD=band != blocks(problem)[0], M=where.rows, K=KEYS,
            TERMS=16, **problem.gated(), num_warps=4,
        )  # fmt: skip

    def gradients(self, problem: Problem, unit: Tensor, tables: list[Tensor]) -> None:
        """Fill the gradients of W1 and W2, the last of the tables, times `unit`."""
        units = self.weights.shape[2] // (2 * HEADS)
        add_up(problem, self.weights, (HEADS, units), unit, tables[2].t(), tables[3])


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
    *("ROWS", "ONE_STAGE", "HEAD_REGISTERS", "MIXER_REGISTERS", "SHARED"),
)


def macros(problem: Problem, mixing: Mixing, where: Layout) -> tuple[int, ...]:
    """Return what the source is compiled for, in the order of `NAMES`."""
    query, key, value = problem.query, problem.key, problem.value
    switches = problem.causal, problem.mask is not None, value.dtype == torch.bfloat16
    return (
        query.shape[1], mixing.weight_in.shape[0], padded_units(mixing), query.shape[3],
        query.shape[1] // key.shape[1], key.stride(2), value.stride(2), *map(int, switches),
        ALIGNMENT, *where,
    )  # fmt: skip


def source(name: str, *values: int) -> str:
    """Return the source of the kernel of that name for these macros."""
    defines = dict(zip(NAMES, values, strict=True)) | {name.upper(): 1}
    return source_of("backward.cu", defines, "lines.cuh")


@cache
def compiled(device: int, name: str, *values: int) -> Kernel:
    """Return the kernel of that name for these macros, on the current device, which is `device`."""
    shared = values[-1] if name == "backward" else 0
    return kernel(source(name, *values), name, capability="90a", shared_memory=shared)
