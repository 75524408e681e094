"""Triton kernels that add partial sums of programs; `tiles` has the legend."""

import triton
import triton.language as tl

from dape.attention.fused.tiles import follow, unwanted

SUM_STRIDES = ("table_r", "table_c", "second_r", "second_c")


@triton.jit(do_not_specialize=("size",))
def zero_kernel(x, size, N: tl.constexpr, gate, GATED: tl.constexpr, CHAINED: tl.constexpr):
    """Store zeros; grid (entries)."""
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    tl.store(x + n, tl.zeros((N,), tl.float32), n < size)


@triton.jit
def added(slots, n, count, slot_size, SLOTS: tl.constexpr, OUT: tl.constexpr):
    """Return the sums of the numbers n of all slots; numbers past the end of a slot are zero."""
    total = tl.zeros((SLOTS, OUT), tl.float32)
    for start in range(0, count, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        at = slot.to(tl.int64)[:, None] * slot_size + n[None, :]
        inside = (slot < count)[:, None] & (n < slot_size)[None, :]
        total += tl.load(slots + at, inside, 0.0)
    return tl.sum(total, 0)


# Arguments without a kernel for every value.
@triton.jit(do_not_specialize=("count", "rows", "columns", *SUM_STRIDES))
def sum_kernel(
    slots, unit, table, second, count, slot_size, rows, columns,
    table_r, table_c, second_r, second_c,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SECOND: tl.constexpr, SLOTS: tl.constexpr,
    OUT: tl.constexpr, gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum matrices `[ROWS, WIDTH]` over slots, times `unit`, into a table; grid (entries).

    If SECOND, the matrix of a second table follows in a slot.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    total = added(slots, n, count, slot_size, SLOTS, OUT) * tl.load(unit)
    matrix, r, c = n // (ROWS * WIDTH), n // WIDTH % ROWS, n % WIDTH
    inside = (r < rows) & (c < columns)
    tl.store(table + r * table_r + c * table_c, total, inside & (matrix == 0))
    if SECOND:
        tl.store(second + r * second_r + c * second_c, total, inside & (matrix == 1))


@triton.jit
def folded(
    lines, terms, slots, reach, lowest, K, count, columns, line_n, line_q, line_r, line_c,
    first, first_column, SPANS: tl.constexpr, SKEWED: tl.constexpr,
    DISTANCES: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Return the sums of all lines of a distance d or -d, for some distances and columns.

    Line r of slot q stands for the distance lowest + q K + r. Therefore at most SPANS slots have
    lines of a distance. The terms are added up at the end, so that no load waits for another.
    """
    d = first + tl.arange(0, DISTANCES)
    c = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
    total = tl.zeros((TERMS, DISTANCES, COLUMNS), tl.float32)
    for negative in tl.static_range(2):
        if (negative == 0) | (first <= -lowest):
            at = (-d if negative else d) - lowest
            for start in range(0, terms, TERMS):
                n = start + tl.arange(0, TERMS)
                for back in tl.static_range(SPANS):
                    q = at // K - back
                    r = at - q * K
                    real = (at >= 0) & (q >= 0) & (q < slots) & (r < reach) & (d < count)
                    if negative:
                        real &= d > 0
                    place = q.to(tl.int64) * line_q + r * line_r
                    inside = (n < terms)[:, None] & real[None, :]
                    if SKEWED:
                        column = r[None, :] - n[:, None]
                        inside &= (column >= 0) & (column < K)
                    here = n.to(tl.int64)[:, None] * line_n + place[None, :]
                    here = here[:, :, None] + (c * line_c)[None, None, :]
                    good = inside[:, :, None] & (c < columns)[None, None, :]
                    total += tl.load(lines + here, good, 0.0)
    return tl.sum(total, 0)


@triton.jit
def fold_kernel(
    lines, unit, table, terms, slots, reach, lowest, K, count, columns,
    line_n, line_q, line_r, line_c, table_d, table_c,
    SPANS: tl.constexpr, SKEWED: tl.constexpr,
    DISTANCES: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
    gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum the terms of all lines of a distance d or -d, times `unit`; grid (|d|, columns)."""
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    first, first_column = tl.program_id(0) * DISTANCES, tl.program_id(1) * COLUMNS
    total = folded(
        lines, terms, slots, reach, lowest, K, count, columns, line_n, line_q, line_r, line_c,
        first, first_column, SPANS, SKEWED, DISTANCES, COLUMNS, TERMS,
    )  # fmt: skip
    d = first + tl.arange(0, DISTANCES)
    c = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
    at = d[:, None] * table_d + (c * table_c)[None, :]
    good = (d < count)[:, None] & (c < columns)[None, :]
    tl.store(table + at, total * tl.load(unit), good)
