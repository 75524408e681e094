"""The whole forward pass across heads in a single kernel, for Hopper; compiled by NVRTC."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dape.attention.fused import overflow
from dape.attention.fused.cuda.launch import Kernel, kernel, source_of
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Problem, Result
from dape.attention.fused.sizes import cdiv, strides
from dape.attention.fused.terms import Mixed

CAPABILITY = (9, 0)
MOST_HEADS, MOST_UNITS, WIDEST_HEAD = 16, 64, 128
# The kernel keeps scores as they are before the scale, and weights over the scale, in fp16.
SMALLEST_SCALE = 2**-7
# Distances of a tile in shared memory.
SPAN = 64
# Registers and bytes of shared memory of a block, on a GPU of `CAPABILITY`.
REGISTERS, SHARED_MEMORY = 65536, 227 * 1024


class Layout(NamedTuple):
    """Constants of the compiled source: rows and keys of a tile, registers of kinds of warps."""

    rows: int
    keys: int
    mixers: int
    queries_shared: int
    head_registers: int
    mixer_registers: int
    shared_memory: int


def layout(heads: int, head_dim: int, units: int) -> Layout | None:
    """Return the layout for a block that holds all heads, or None if no layout fits."""
    head_warps, mixers = cdiv(heads, 4) * 4, 4
    rows = 32 if head_dim <= 64 and head_warps <= 12 else 16
    if head_dim > 64 and head_warps > 12:
        return None
    plenty = REGISTERS // (32 * (head_warps + mixers)) >= 144
    for keys in (32, 16):
        for shared in (1, 0):
            lines = heads * (2 * keys + shared * rows) * head_dim * 2
            scores = 2 * 16 * (rows * keys + 8) * 2
            tables = 2 * SPAN * units * 2 + heads * (2 * SPAN + 16) * 4
            size = lines + scores + tables
            if size <= SHARED_MEMORY:
                registers = (136, 104) if shared or units > 32 else (144, 80)
                registers = (0, 0) if plenty or head_warps > 12 else registers
                return Layout(rows, keys, mixers, shared, *registers, size)
    return None


def layout_of(problem: Problem, terms: Mixed) -> Layout | None:
    """Return the layout for a problem, or None for a problem that the kernel does not serve.

    A problem of few rows, which would leave most of the GPU without a block, is not served.
    """
    batch, heads, rows, head_dim = problem.query.shape
    units = padded_units(terms)
    served = (
        torch.cuda.get_device_capability() == CAPABILITY
        and problem.query.element_size() == 2
        and problem.offset >= 0
        and abs(problem.scale) >= SMALLEST_SCALE
        and heads <= MOST_HEADS
        and units <= MOST_UNITS
        and head_dim == problem.value.shape[3]
        and head_dim % 16 == 0
        and head_dim <= WIDEST_HEAD
    )
    if not served:
        return None
    where = layout(heads, head_dim, units)
    processors = torch.cuda.get_device_properties().multi_processor_count
    busy = where is not None and batch * cdiv(rows, where.rows) >= processors // 8
    return where if busy else None


def padded_units(terms: Mixed) -> int:
    """Return the hidden units padded to whole products."""
    return cdiv(len(terms.weight_in), 16) * 16


def forward(problem: Problem, terms: Mixed, where: Layout, found: Result) -> None:
    """Fill a result, with a flag for weights and numbers too large for 16 bits."""
    query, key, value = map(aligned, (problem.query, problem.key, problem.value))
    batch, heads, rows = query.shape[:3]
    keys, units = key.shape[2], padded_units(terms)
    low = -SPAN - (where.keys if problem.causal else cdiv(keys, where.keys) * where.keys)
    distances = cdiv(rows, where.rows) * where.rows + problem.offset + SPAN - low
    hidden = query.new_empty(distances, units, dtype=torch.float16)
    fixed = query.new_empty(heads, distances, dtype=torch.float32)
    linear = query.new_empty(heads, heads, dtype=torch.float32)
    mask = query if problem.mask is None else problem.mask
    given = problem._replace(query=query, key=key, value=value)
    values = macros(given, terms, where, found.exact)
    start(
        compiled("pack_tables", *values),
        (min(cdiv(distances * (units + heads), 256), 2048), 1, 1, 256, 1, 1),
    )(
        terms.hidden, terms.static, terms.weight_in, terms.weight_out,
        hidden, fixed, linear, found.flag, overflow.largest_weight(), len(terms.hidden), low,
        distances,
    )  # fmt: skip
    block = 32 * (cdiv(heads, 4) * 4 + where.mixers)
    start(compiled("forward", *values), (cdiv(rows, where.rows) * batch, 1, 1, block, 1, 1))(
        query, key, value, found.out, found.rest, found.lse, terms.weight_in, terms.weight_out,
        hidden, fixed, linear, mask, found.flag,
        rows, keys, distances, low, problem.offset, float(problem.scale),
        overflow.LARGEST_SCORE, overflow.largest_sum(found.exact),
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *strides(found.out),
        *found.lse.stride()[:2], mask.stride(0),
    )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    """Return `x` with rows at multiples of 16 bytes."""
    fits = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])
    return x if fits else x.contiguous()


NAMES = (
    *("H", "D", "UNITS", "E", "GROUP", "Q_T", "K_T", "V_T", "CAUSAL", "MASKED", "BF16", "RESTED"),
    *("ROWS", "KEYS", "MIXERS", "QUERIES_SHARED", "HEAD_REGISTERS", "MIXER_REGISTERS", "SHARED"),
)


def macros(problem: Problem, terms: Mixed, where: Layout, rested: bool) -> tuple[int, ...]:
    """Return the constants of the compiled source, in the order of `NAMES`."""
    query, key, value = problem.query, problem.key, problem.value
    heads, units = query.shape[1], padded_units(terms)
    switches = problem.causal, problem.mask is not None, query.dtype == torch.bfloat16, rested
    return (
        heads, len(terms.weight_in), units, query.shape[3], heads // key.shape[1],
        query.stride(2), key.stride(2), value.stride(2), *map(int, switches), *where,
    )  # fmt: skip


def source(name: str, *values: int) -> str:
    """Return the source of a named kernel for some macros."""
    parts = ("lines.cuh", "forward_heads.cuh", "forward_mixers.cuh") if name == "forward" else ()
    return source_of(dict(zip(NAMES, values, strict=True)), "forward.cuh", *parts, f"{name}.cu")


def compiled(name: str, *values: int) -> Kernel:
    """Return a named kernel for some macros, on the current device."""
    return compiled_on(torch.cuda.current_device(), name, *values)


@cache
def compiled_on(device: int, name: str, *values: int) -> Kernel:
    """Return a named kernel for some macros, on the current device, which must be `device`."""
    shared_memory = values[-1] if name == "forward" else 0
    return kernel(source(name, *values), name, capability="90a", shared_memory=shared_memory)
