"""Triton kernels that put together what programs have summed; `tiles` has the legend."""

import triton
import triton.language as tl

from dape.attention.fused.tiles import unwanted
from dape.jit import started

SUM_STRIDES = ("table_r", "table_c", "second_r", "second_c")


# Of any sizes: one kernel for all that share what is compiled.
@started
@triton.jit(do_not_specialize=("count", "slot_size", "rows", "columns", "groups", *SUM_STRIDES))
def sum_kernel(
    slots, unit, table, second, count, slot_size, rows, columns, groups,
    table_r, table_c, second_r, second_c,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SECOND: tl.constexpr, SLOTS: tl.constexpr,
    OUT: tl.constexpr, gate, GATED: tl.constexpr,
):  # fmt: skip
    """Sum matrices `[groups, ROWS, WIDTH]` over slots, times `unit`, into a table; grid (entries).

    A table has the rows of all groups. If SECOND, as many groups follow for a second table.
    """
    if unwanted(gate, GATED):
        return
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    total = tl.zeros((OUT,), tl.float32)
    for start in range(0, count, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        at = slot.to(tl.int64)[:, None] * slot_size + n[None, :]
        inside = (slot < count)[:, None] & (n < slot_size)[None, :]
        total += tl.sum(tl.load(slots + at, inside, 0.0), 0)
    group, r, c = n // (ROWS * WIDTH), n // WIDTH % ROWS, n % WIDTH
    total *= tl.load(unit)
    inside = (r < rows) & (c < columns)
    tl.store(table + (group * rows + r) * table_r + c * table_c, total, inside & (group < groups))
    if SECOND:
        group -= groups
        at = second + (group * rows + r) * second_r + c * second_c
        tl.store(at, total, inside & (group >= 0) & (group < groups))


@started
@triton.jit
def fold_kernel(
    lines, unit, table, terms, slots, reach, lowest, K, count, columns,
    line_n, line_q, line_r, line_c, table_d, table_c,
    SPANS: tl.constexpr, SKEWED: tl.constexpr,
    DISTANCES: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
    gate, GATED: tl.constexpr,
):  # fmt: skip
    """Sum the terms of the lines that stand for a distance or its negative; grid (|d|, columns).

    Line r of slot q stands for the distance lowest + q K + r, so that a distance is found in no
    more than SPANS slots.
    """
    if unwanted(gate, GATED):
        return
    first = tl.program_id(0) * DISTANCES
    d, c = first + tl.arange(0, DISTANCES), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((DISTANCES, COLUMNS), tl.float32)
    for negative in tl.static_range(2):
        if (negative == 0) | (first <= -lowest):
            at = (-d if negative else d) - lowest
            for back in tl.static_range(SPANS):
                q = at // K - back
                r = at - q * K
                real = (at >= 0) & (q >= 0) & (q < slots) & (r < reach) & (d < count)
                if negative:
                    real &= d > 0
                place = q.to(tl.int64) * line_q + r * line_r
                for start in range(0, terms, TERMS):
                    n = start + tl.arange(0, TERMS)
                    inside = (n < terms)[:, None] & real[None, :]
                    if SKEWED:
                        column = r[None, :] - n[:, None]
                        inside &= (column >= 0) & (column < K)
                    here = n.to(tl.int64)[:, None] * line_n + place[None, :]
                    here = here[:, :, None] + (c * line_c)[None, None, :]
                    good = inside[:, :, None] & (c < columns)[None, None, :]
                    total += tl.sum(tl.load(lines + here, good, 0.0), 0)
    at = d[:, None] * table_d + (c * table_c)[None, :]
    good = (d < count)[:, None] & (c < columns)[None, :]
    tl.store(table + at, total * tl.load(unit), good)


SPAN_SIZES = ("batch", "row_tiles", "parts", "span", "rows", "keys", "shift", "count")


# Of any sizes: one kernel for all bands.
@started
@triton.jit(do_not_specialize=SPAN_SIZES)
def distances_kernel(
    slots, static, hidden, batch, row_tiles, parts, span, rows, keys, shift, count,
    H: tl.constexpr, D: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr, CAUSAL: tl.constexpr, ADD: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, TERMS: tl.constexpr, gate, GATED: tl.constexpr,
):  # fmt: skip
    """Store, or ADD, the gradients of C `[H, N]` and U `[N, D]` of a band; grid (distances).

    Row tile i has K distances for each of its steps, those of step n from M i - K n + M - K + shift
    on. Each of its `parts` has `span` tiles of keys and as many steps, and one more behind its last
    tile, which is the first step of the next part too.
    """
    if unwanted(gate, GATED):
        return
    d, c = tl.program_id(0), tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.float32)
    for negative in tl.static_range(1 if CAUSAL else 2):
        from_first = (-d if negative else d) - (M - K + shift)
        # Earlier tiles have no row so far from a key.
        first = tl.maximum(0, from_first - K + M) // M
        live = row_tiles - first
        for start in range(0, batch * live, TERMS):
            n = start + tl.arange(0, TERMS)
            tile = first + n % live
            first_row = tile * M
            end = tl.full((TERMS,), 0, tl.int32) + keys
            if CAUSAL:
                end = tl.minimum(end, tl.minimum(rows, first_row + M) + shift)
            tiles = (tl.maximum(end, 0) + K - 1) // K
            line = (from_first - first_row) & (K - 1)
            step = (line + first_row - from_first) // K
            inside = (n < batch * live) & (step >= 0)
            if negative:
                inside &= d > 0
            for behind in tl.static_range(2):
                part = tl.maximum(step - behind, 0) // span
                local = step - part * span
                if behind:
                    last = (local == span) | (step == tiles)
                    good = inside & (step > 0) & (step <= tiles) & last
                else:
                    good = inside & (step < tiles)
                if tl.max(good.to(tl.int32), 0) > 0:
                    block = ((n // live).to(tl.int64) * row_tiles + tile) * parts + part
                    at = (block * (span + 1) + local) * K + line
                    wanted = good[:, None] & (c < COLUMNS)[None, :]
                    found = tl.load(slots + at[:, None] * COLUMNS + c[None, :], wanted, 0.0)
                    total += tl.sum(found, 0)
    at_u, at_c = hidden + d * D + c, static + (c - UNITS) * count + d
    of_u, of_c = c < D, (c >= UNITS) & (c < UNITS + H)
    if ADD:
        total += tl.load(at_u, of_u, 0.0) + tl.load(at_c, of_c, 0.0)
    tl.store(at_u, total, of_u)
    tl.store(at_c, total, of_c)
