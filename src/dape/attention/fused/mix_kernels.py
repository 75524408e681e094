"""Triton kernels across heads of the banded design, and the fold of what they sum.

U and C are tables over the distance, so a tile that moves along a diagonal sees the same entries
all the way: they are loaded once, and their gradients are summed in registers before one reduction.
Shapes as in `kernels`.
"""

import triton
import triton.language as tl

from dape.attention.fused.kernels import BLOCK, LOG2E, unwanted

SUM_STRIDES = ("table_r", "table_c", "second_r", "second_c")


@triton.jit
def load_hidden(hidden, delta, units, size, D: tl.constexpr):
    """Return U `[N, D]` at the distances of a tile's positions."""
    distance = tl.abs(delta)[:, None]
    inside = (distance < size) & (units[None, :] < D)
    return tl.load(hidden + distance * D + units[None, :], inside, 0.0)


@triton.jit
def load_static(static, delta, heads, size, H: tl.constexpr):
    """Return C `[N, H]` at the distances of a tile's positions."""
    distance = tl.abs(delta)[:, None]
    inside = (distance < size) & (heads[None, :] < H)
    return tl.load(static + heads[None, :] * size + distance, inside, 0.0)


@triton.jit
def rise(w, u):
    """Return phi(w + u) - phi(u), exact however large u is.

    For relu(w + u) - relu(u) = max(w, -u) + min(u, 0), at each sign of u.
    """
    return 0.01 * w + 0.99 * (tl.maximum(w, -u) + tl.minimum(u, 0.0))


@triton.jit
def mlp(x, w_in, w_out, one, u, PRECISION: tl.constexpr):
    """Return z = W1 x + u, r = phi(z) - phi(u) and y = x + W2 r of `[N, H]` scores.

    The residual is a product with the identity `one`: x already lies where a product reads it.
    """
    w = tl.dot(x, w_in, input_precision=PRECISION)
    r = rise(w, u).to(x.dtype)
    y = tl.dot(x, one, input_precision=PRECISION)
    return w + u, r, tl.dot(r, w_out, y, input_precision=PRECISION)


@triton.jit
def diagonal_tiles(q, band_tile, num_rows, num_keys, M: tl.constexpr, K: tl.constexpr):
    """Return the row tiles of this program on diagonal q, and the key where row tile 0 starts.

    Tile t of diagonal q holds rows t M + m and keys start + t M + n: i - j is the same for all t.
    The programs of axis 2 share them, each a segment.
    """
    start = (band_tile - q) * K
    first = tl.cdiv(tl.maximum(0, 1 - start - K), M)
    last = tl.cdiv(tl.minimum(num_rows, tl.maximum(0, num_keys - start)), M)
    share = tl.cdiv(tl.maximum(0, last - first), tl.num_programs(2))
    first += tl.program_id(2) * share
    return first, tl.minimum(last, first + share), start


@triton.jit
def lies(rows, keys, num_rows, num_keys):
    """Return which positions lie in the scratch.

    Its keys end with a block, so that a vector of keys lies in it or does not.
    """
    return (rows < num_rows) & (keys >= 0) & (keys < tl.cdiv(num_keys, BLOCK) * BLOCK)


@triton.jit
def tile_positions(
    tile, start, n, delta_ij, num_rows, num_keys, mask,
    M: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return rows and keys of a tile's positions, which lie in the scratch, and which are seen."""
    rows, keys = tile * M + n // K, start + tile * M + n % K
    there = lies(rows, keys, num_rows, num_keys)
    seen = there & (keys < num_keys)
    if MASKED:
        seen &= tl.load(mask + keys, seen, 0) != 0
    if CAUSAL:
        seen &= delta_ij >= 0
    return rows, keys, there, seen


@triton.jit
def places_of_heads(rows, keys, heads, row_size, H: tl.constexpr):
    """Return where all heads of a tile's positions `[N]` lie in the scratch, `[N, HEADS]`."""
    at = rows.to(tl.int64) * row_size + keys // BLOCK * (BLOCK * H) + keys % BLOCK
    return at[:, None] + heads[None, :] * BLOCK


@triton.jit
def load_weights(w1, w2, heads, units, H: tl.constexpr, D: tl.constexpr):
    """Return W1^T and W2, both `[H, D]`."""
    inside = (heads[:, None] < H) & (units[None, :] < D)
    w1_HD = tl.load(w1 + units[None, :] * H + heads[:, None], inside, 0.0)
    return w1_HD, tl.load(w2 + heads[:, None] * D + units[None, :], inside, 0.0)


@triton.jit
def mix_kernel(
    x, w1, w2, hidden_table, mask,
    num_rows, num_keys, table_size, first_diagonal, band_tile, offset, x_b, x_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, gate, GATED: tl.constexpr,
):  # fmt: skip
    """X <- X + W2 (phi(W1 X + U) - phi(U)), -inf if unseen; grid (diagonals, B, segments)."""
    if unwanted(gate, GATED):
        return
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    delta_ij = q * K + offset + n // K - n % K
    u = load_hidden(hidden_table, delta_ij, units, table_size, D)
    w1_HD, w2_HD = load_weights(w1, w2, heads, units, H, D)
    w_in, w_out = w1_HD.to(compute), tl.trans(w2_HD.to(compute))
    one = (heads[:, None] == heads[None, :]).to(compute)
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys, M, K)
    for tile in range(first, last):
        rows, keys, there, seen = tile_positions(
            tile, start, n, delta_ij, num_rows, num_keys, mask + b * mask_b,
            M, K, CAUSAL, MASKED,
        )  # fmt: skip
        at = b.to(tl.int64) * x_b + places_of_heads(rows, keys, heads, x_t, H)
        inside = there[:, None] & (heads[None, :] < H)
        a = tl.where(seen[:, None], tl.load(x + at, inside, 0.0), 0.0)
        _z, _rise, y = mlp(a, w_in, w_out, one, u, PRECISION)
        s = tl.where(seen[:, None], y, float("-inf"))
        tl.store(x + at, s.to(compute), inside)


@triton.jit
def mix_backward_kernel(
    x, y, w1, w2, hidden_table, static_table, lse, delta, mask,
    sums, num_rows, num_keys, table_size, first_diagonal, band_tile, offset, slots, slot_size,
    x_b, x_t, stat_b, stat_h, stat_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr, ADD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    gate, GATED: tl.constexpr,
):  # fmt: skip
    """X <- P, Y <- dA along one diagonal, and its share of every weight's gradient.

    dS = P (dP - delta), dh = W2^T dS, dz = phi'(z) dh, dA = dS + W1^T dz. U has dz, and W2 has
    dS r^T for r = phi(z) - phi(U), beside what it has in C. Grid (diagonals, B, segments). Shares
    are added to those of earlier bands, if any, in the segment's own slot, so that the sum over the
    slots, and with it every gradient, has one order.
    """
    if unwanted(gate, GATED):
        return
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    delta_ij = q * K + offset + n // K - n % K
    u = load_hidden(hidden_table, delta_ij, units, table_size, D)
    c = load_static(static_table, delta_ij, heads, table_size, H)
    w1_HD, w2_HD = load_weights(w1, w2, heads, units, H, D)
    w1_HD, w2_HD = w1_HD.to(compute), w2_HD.to(compute)
    one = (heads[:, None] == heads[None, :]).to(compute)
    sum_u = tl.zeros((M * K, UNITS), tl.float32)
    sum_c = tl.zeros((M * K, HEADS), tl.float32)
    sum_w1 = tl.zeros((UNITS, HEADS), tl.float32)
    sum_w2 = tl.zeros((HEADS, UNITS), tl.float32)
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys, M, K)
    for tile in range(first, last):
        rows, keys, there, seen = tile_positions(
            tile, start, n, delta_ij, num_rows, num_keys, mask + b * mask_b,
            M, K, CAUSAL, MASKED,
        )  # fmt: skip
        inside, seen_heads = (
            there[:, None] & (heads[None, :] < H),
            seen[:, None] & (heads[None, :] < H),
        )
        at = b.to(tl.int64) * x_b + places_of_heads(rows, keys, heads, x_t, H)
        a = tl.where(seen[:, None], tl.load(x + at, inside, 0.0), 0.0)
        dp = tl.where(seen[:, None], tl.load(y + at, inside, 0.0), 0.0).to(tl.float32)
        z, r, logit = mlp(a, w1_HD, tl.trans(w2_HD), one, u, PRECISION)
        logit = logit.to(compute).to(tl.float32) + c  # as the forward pass had it
        stat = b * stat_b + heads[None, :] * stat_h + rows[:, None] * stat_t
        log_sum = tl.load(lse + stat, seen_heads, 0.0)
        shared = tl.load(delta + stat, seen_heads, 0.0)
        weight = tl.where(seen_heads, tl.exp2((logit - log_sum) * LOG2E), 0.0)
        ds = weight * (dp - shared)
        dh = tl.dot(ds.to(compute), w2_HD, input_precision=PRECISION)
        dz = tl.where(z > 0, dh, 0.01 * dh)
        da = tl.dot(dz.to(compute), tl.trans(w1_HD), ds, input_precision=PRECISION)
        tl.store(x + at, weight.to(compute), inside)
        tl.store(y + at, da.to(compute), inside)
        sum_w2 = tl.dot(tl.trans(ds.to(compute)), r, sum_w2, input_precision=PRECISION)
        sum_w1 = tl.dot(tl.trans(dz.to(compute)), a, sum_w1, input_precision=PRECISION)
        sum_u += dz
        sum_c += ds
    slot = (b * tl.num_programs(2) + tl.program_id(2)) * slots + tl.program_id(0)
    sums += slot.to(tl.int64) * slot_size
    # Summing a tile along its diagonals is a product with zeros and ones.
    lines = tl.arange(0, LINES)
    pick = (lines[:, None] == (n // K - n % K + K - 1)[None, :]).to(tl.float32)
    at_u = lines[:, None] * UNITS + units[None, :]
    add_or_store(sums + at_u, tl.dot(pick, sum_u, input_precision="tf32x3"), ADD)
    sums += LINES * UNITS
    at_c = heads[None, :] * LINES + lines[:, None]
    add_or_store(sums + at_c, tl.dot(pick, sum_c, input_precision="tf32x3"), ADD)
    sums += LINES * HEADS
    add_or_store(sums + heads[None, :] * UNITS + units[:, None], sum_w1, ADD)
    sums += UNITS * HEADS
    add_or_store(sums + heads[:, None] * UNITS + units[None, :], sum_w2, ADD)


@triton.jit
def add_or_store(at, share, ADD: tl.constexpr):
    """Store a share, or add it to what is there."""
    if ADD:
        share += tl.load(at)
    tl.store(at, share)


# Of any sizes: one kernel for all that share what is compiled.
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
