"""Triton kernels of the banded design: attention that mixes heads, without a square in memory.

The queries are taken in bands of rows; for one band the scores of all heads stand in a scratch
buffer, and every kernel below is a simple pass over it:

    scores           X = scale Q K^T                      one head, tiles of rows and keys
    mix              X <- X + W2 phi(W1 X + U) + C         all heads, tiles along a diagonal
    softmax_value    O = softmax(X) V                      one head, rows against a span of keys
    mix_backward     X <- P, Y <- dA from Y = dO V^T       all heads, tiles along a diagonal
    grad_query       dQ = scale dA K                       one head
    grad_key_value   dK += scale dA^T Q, dV += P^T dO      one key head

U and C are tables over the distance, so a tile that moves along a diagonal sees the same entries
all the way: they are loaded once, and their gradients are summed in registers before one reduction.

In the scratch `[B, rows, blocks of keys, H, BLOCK]` all heads of a few keys are neighbours: what
the kernels across heads want is one piece, and a kernel of one head still finds whole sectors.

Shapes: B batch, H query heads, G query heads a key head, R rows of the band, T keys, E head dim,
D hidden units, N positions of a tile (M rows x K keys). A capital suffix is a compile-time size.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Keys of one head that lie side by side in the scratch.
BLOCK = tl.constexpr(64)


@triton.jit
def load_rows(base, stride, start, count, E: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Load `[ROWS, WIDE]` of a `[count, E]` matrix with contiguous rows, zeros outside."""
    rows, columns = start + tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = (rows[:, None] >= 0) & (rows[:, None] < count) & (columns[None, :] < E)
    return tl.load(base + rows[:, None].to(tl.int64) * stride + columns[None, :], inside, 0.0)


@triton.jit
def sees(rows, keys, num_rows, num_keys, shift, CAUSAL: tl.constexpr):
    """Return which of `keys` each of `rows` may see; `shift` is the slot of the first row."""
    seen = (rows < num_rows) & (keys < num_keys)
    if CAUSAL:
        seen &= keys <= rows + shift
    return seen


@triton.jit
def places(rows, first_key, row_size, heads, K: tl.constexpr):
    """Return where K keys of one head lie in the scratch, from a multiple of K on."""
    keys = tl.arange(0, K)[None, :]
    if K < BLOCK:
        keys += first_key
        columns = keys // BLOCK * (BLOCK * heads) + keys % BLOCK
    else:
        columns = first_key * heads + keys // BLOCK * (BLOCK * heads) + keys % BLOCK
    return rows.to(tl.int64) * row_size + columns


@triton.jit
def scores_kernel(
    left, right, x, scale, unit, num_rows, num_keys, shift,
    left_b, left_h, left_t, right_b, right_h, right_t, x_b, x_t,
    HEADS, GROUP, E: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr, IN_UNITS: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X = scale left right^T for a tile of rows and keys of one head; grid (tiles H, B).

    If IN_UNITS, divided by `unit`.
    """
    b, h, tile = tl.program_id(1), tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    across = tl.cdiv(num_keys, K)
    first_row, first_key = tile // across * M, tile % across * K
    if CAUSAL and first_key > first_row + M - 1 + shift:
        return
    left += b.to(tl.int64) * left_b + h * left_h
    right += b.to(tl.int64) * right_b + (h // GROUP) * right_h
    a = load_rows(left, left_t, first_row, num_rows, E, M, WIDE)
    k = load_rows(right, right_t, first_key, num_keys, E, K, WIDE)
    if IN_UNITS:
        scale = scale / tl.load(unit)
    out = tl.dot(a, tl.trans(k), input_precision=PRECISION) * scale
    if x.dtype.element_ty == tl.float16:
        out = tl.clamp(out, -65504.0, 65504.0)
    rows, keys = first_row + tl.arange(0, M)[:, None], first_key + tl.arange(0, K)[None, :]
    x += b.to(tl.int64) * x_b + h * BLOCK
    inside = (rows < num_rows) & (keys < tl.cdiv(num_keys, BLOCK) * BLOCK)
    tl.store(x + places(rows, first_key, x_t, HEADS, K), out.to(x.dtype.element_ty), inside)


@triton.jit
def load_tables(hidden, static, delta, heads, units, size, H: tl.constexpr, D: tl.constexpr):
    """Return U `[N, D]` and C `[N, H]` at the distances of a tile's positions."""
    distance = tl.abs(delta)[:, None]
    inside = (distance < size) & (units[None, :] < D)
    u = tl.load(hidden + distance * D + units[None, :], inside, 0.0)
    inside = (distance < size) & (heads[None, :] < H)
    return u, tl.load(static + heads[None, :] * size + distance, inside, 0.0)


@triton.jit
def mlp(x, w_in, w_out, one, u, PRECISION: tl.constexpr):
    """Return z = W1 x + u, phi(z) and y = x + W2 phi(z) of `[N, H]` scores; `one` is the identity.

    The residual is a product with the identity, since x already lies where a product reads it.
    """
    z = tl.dot(x, w_in, u, input_precision=PRECISION)
    hidden = tl.where(z > 0, z, 0.01 * z).to(x.dtype)
    y = tl.dot(x, one, input_precision=PRECISION)
    return z, hidden, tl.dot(hidden, w_out, y, input_precision=PRECISION)


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
def tile_positions(
    tile, start, n, delta_ij, num_rows, num_keys, mask,
    M: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return rows and keys of a tile's positions, which lie in the scratch, and which are seen.

    Keys in the scratch end with a block, so that a vector of keys lies in it or does not.
    """
    rows, keys = tile * M + n // K, start + tile * M + n % K
    there = (rows < num_rows) & (keys >= 0) & (keys < tl.cdiv(num_keys, BLOCK) * BLOCK)
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
    x, w1, w2, hidden_table, static_table, mask,
    num_rows, num_keys, table_size, first_diagonal, band_tile, offset, x_b, x_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """X <- X + W2 phi(W1 X + U) + C, -inf if unseen; grid (diagonals, B, segments)."""
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    delta_ij = q * K + offset + n // K - n % K
    u, c = load_tables(hidden_table, static_table, delta_ij, heads, units, table_size, H, D)
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
        _z, _hidden, y = mlp(a, w_in, w_out, one, u, PRECISION)
        s = tl.where(seen[:, None], y + c, float("-inf"))
        tl.store(x + at, s.to(compute), inside)


@triton.jit
def mix_backward_kernel(
    x, y, w1, w2, hidden_table, static_table, lse, delta, mask,
    sums, num_rows, num_keys, table_size, first_diagonal, band_tile, offset, slots, slot_size,
    x_b, x_t, stat_b, stat_h, stat_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr, ADD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X <- P, Y <- dA along one diagonal, and its share of every weight's gradient.

    dS = P (dP - delta), dh = W2^T dS, dz = phi'(z) dh, dA = dS + W1^T dz. Grid (diagonals, B,
    segments). The shares are added to those of earlier bands, if any, in the segment's own slot, so
    that the sum over the slots, and with it every gradient, has one order.
    """
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    delta_ij = q * K + offset + n // K - n % K
    u, c = load_tables(hidden_table, static_table, delta_ij, heads, units, table_size, H, D)
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
        z, hidden, logit = mlp(a, w1_HD, tl.trans(w2_HD), one, u, PRECISION)
        logit = (logit + c).to(compute).to(tl.float32)  # as the forward pass stored it
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
        sum_w2 = tl.dot(tl.trans(ds.to(compute)), hidden, sum_w2, input_precision=PRECISION)
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


@triton.jit
def fold_kernel(
    lines, unit, table, terms, slots, reach, lowest, K, count, columns,
    line_n, line_q, line_r, line_c, table_d, table_c,
    SPANS: tl.constexpr, SKEWED: tl.constexpr,
    DISTANCES: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Sum the terms of the lines that stand for a distance or its negative; grid (|d|, columns).

    Line r of slot q stands for the distance lowest + q K + r, so that a distance is found in no
    more than SPANS slots.
    """
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


@triton.jit
def store_output(out, rest, at, o, inside, RESTED: tl.constexpr):
    """Store O in the dtype of `out`, and what rounding left of it, as a tensor of the same kind."""
    rounded = o.to(out.dtype.element_ty)
    tl.store(out + at, rounded, inside)
    if RESTED:
        tl.store(rest + at, (o - rounded.to(tl.float32)).to(rest.dtype.element_ty), inside)


@triton.jit
def softmax_value_kernel(
    x, value, out, lse, rest, num_rows, num_keys, shift, keys_per_split,
    x_b, x_t, value_b, value_h, value_t,
    out_s, out_b, out_h, out_t, lse_s, lse_b, lse_h,
    HEADS, GROUP, V: tl.constexpr, WIDE_V: tl.constexpr, CAUSAL: tl.constexpr,
    EXACT: tl.constexpr, RESTED: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """O = softmax(X) V of one head, rows against a span of keys; grid (rows, B H, spans).

    If EXACT, what rounding took from P meets V too.
    """
    b, h = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    rows = first_row + tl.arange(0, M)[:, None]
    b64 = b.to(tl.int64)
    x += b64 * x_b + h * BLOCK
    value += b64 * value_b + (h // GROUP) * value_h
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, WIDE_V), tl.float32)
    low = tl.program_id(2) * keys_per_split
    high = tl.minimum(num_keys, low + keys_per_split)
    if CAUSAL:
        high = tl.minimum(high, first_row + M + shift)
    for first_key in range(low, high, K):
        keys = first_key + tl.arange(0, K)[None, :]
        inside = (rows < num_rows) & (keys < tl.cdiv(num_keys, BLOCK) * BLOCK)
        s = tl.load(x + places(rows, first_key, x_t, HEADS, K), inside, 0.0)
        seen = sees(rows, keys, num_rows, num_keys, shift, CAUSAL)
        s = tl.where(seen, s.to(tl.float32) * LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weight, 1)
        v = load_rows(value, value_t, first_key, num_keys, V, K, WIDE_V)
        rounded = weight.to(v.dtype)
        acc = tl.dot(rounded, v, acc * shrink[:, None], input_precision=PRECISION)
        if EXACT:
            left = (weight - rounded.to(tl.float32)).to(v.dtype)
            acc = tl.dot(left, v, acc, input_precision=PRECISION)
        top = new_top
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    columns = tl.arange(0, WIDE_V)[None, :]
    at = tl.program_id(2) * out_s + b64 * out_b + h * out_h + rows.to(tl.int64) * out_t + columns
    store_output(out, rest, at, acc, (rows < num_rows) & (columns < V), RESTED)
    line = first_row + tl.arange(0, M)
    at = tl.program_id(2) * lse_s + b64 * lse_b + h * lse_h + line
    log_sum = top + tl.log2(tl.where(total > 0, total, 1.0))  # top is -inf where nothing is seen
    tl.store(lse + at, log_sum / LOG2E, line < num_rows)


@triton.jit
def combine_kernel(
    part, part_lse, out, lse, rest, num_rows, part_s, part_r, lse_s,
    out_b, out_h, out_t, lse_b, lse_h,
    HEADS, V: tl.constexpr, WIDE_V: tl.constexpr, SPANS: tl.constexpr, RESTED: tl.constexpr,
):  # fmt: skip
    """O of a row from those of its spans, weighted by their softmax mass; grid (rows, B H)."""
    b, h = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    row = tl.program_id(1) * num_rows + tl.program_id(0)
    spans, columns = tl.arange(0, SPANS), tl.arange(0, WIDE_V)
    mass = tl.load(part_lse + spans * lse_s + row)
    top = tl.max(mass, 0)
    weight = tl.exp(mass - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    at = spans[:, None].to(tl.int64) * part_s + row.to(tl.int64) * part_r + columns[None, :]
    parts = tl.load(part + at, (columns < V)[None, :], 0.0)
    o = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    at = b.to(tl.int64) * out_b + h * out_h + tl.program_id(0).to(tl.int64) * out_t + columns
    store_output(out, rest, at, o, columns < V, RESTED)
    log_sum = top + tl.log(tl.where(total > 0, total, 1.0))
    tl.store(lse + b * lse_b + h * lse_h + tl.program_id(0), log_sum)


@triton.jit
def store_half(
    x, half, num_rows, heads, x_b, x_h, x_t, half_b, half_h, half_t,
    E: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Store some rows of X in fp16, no larger than the largest number that bf16 has too."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    first_row = tl.program_id(0) * M
    rows, columns = first_row + tl.arange(0, M)[:, None], tl.arange(0, WIDE)[None, :]
    values = load_rows(x + b * x_b + h * x_h, x_t, first_row, num_rows, E, M, WIDE)
    values = tl.clamp(values.to(tl.float32), -65280.0, 65280.0).to(tl.float16)
    at = half + b * half_b + h * half_h + rows.to(tl.int64) * half_t + columns
    tl.store(at, values, (rows < num_rows) & (columns < E))


@triton.jit
def half_kernel(
    query, key, value, half_query, half_key, half_value, num_rows, num_keys, BATCH, HEADS, KV_HEADS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    hq_b, hq_h, hq_t, hk_b, hk_h, hk_t, hv_b, hv_h, hv_t,
    E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Store Q, K and, if asked, V in fp16; grid (rows, B H, 2 or 3), of rows and heads the most."""
    which, line = tl.program_id(2), tl.program_id(1)
    if which == 0:
        if line < BATCH * HEADS:
            store_half(
                query, half_query, num_rows, HEADS, q_b, q_h, q_t, hq_b, hq_h, hq_t, E, WIDE, M
            )
    elif line < BATCH * KV_HEADS:
        if which == 1:
            store_half(
                key, half_key, num_keys, KV_HEADS, k_b, k_h, k_t, hk_b, hk_h, hk_t, E, WIDE, M
            )
        else:
            store_half(
                value, half_value, num_keys, KV_HEADS, v_b, v_h, v_t, hv_b, hv_h, hv_t,
                V, WIDE_V, M,
            )  # fmt: skip


@triton.jit
def row_products_kernel(
    out, rest, grad_out, lse, unit, scaled, copied, delta, num_rows,
    out_b, out_h, out_t, grad_b, grad_h, grad_t, lse_b, lse_h,
    scaled_b, scaled_h, scaled_t, delta_b, delta_h, delta_t,
    HEADS, V: tl.constexpr, WIDE_V: tl.constexpr, RESTED: tl.constexpr, COPIED: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Store dO / unit, and delta = O . dO / unit by row; grid (rows, B H).

    If COPIED, the log-sum-exp goes beside delta.
    """
    b, h = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    first_row = tl.program_id(0) * M
    line, b64 = first_row + tl.arange(0, M), b.to(tl.int64)
    at = b64 * out_b + h * out_h
    o = load_rows(out + at, out_t, first_row, num_rows, V, M, WIDE_V).to(tl.float32)
    if RESTED:
        o += load_rows(rest + at, out_t, first_row, num_rows, V, M, WIDE_V)
    do = load_rows(grad_out + b64 * grad_b + h * grad_h, grad_t, first_row, num_rows, V, M, WIDE_V)
    do = do.to(tl.float32) / tl.load(unit)
    columns = tl.arange(0, WIDE_V)[None, :]
    at = scaled + b64 * scaled_b + h * scaled_h + line[:, None].to(tl.int64) * scaled_t + columns
    inside = (line < num_rows)[:, None] & (columns < V)
    tl.store(at, do.to(scaled.dtype.element_ty), inside)
    products = tl.sum(o * do, 1)
    at = b64 * delta_b + h * delta_h + line * delta_t
    tl.store(delta + at, products, line < num_rows)
    if COPIED:
        log_sum = tl.load(lse + b64 * lse_b + h * lse_h + line, line < num_rows)
        tl.store(copied + at, log_sum, line < num_rows)


@triton.jit
def grad_query_kernel(
    y, key, unit, grad_query, num_rows, num_keys, shift, keys_per_span, scale,
    y_b, y_t, key_b, key_h, key_t, grad_s, grad_b, grad_h, grad_t,
    HEADS, GROUP, E: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dQ = unit scale dA K of one head and a span of keys; grid (rows H, B, spans)."""
    b, h = tl.program_id(1), tl.program_id(0) % HEADS
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) // HEADS * M
    line = first_row + tl.arange(0, M)
    rows = line[:, None]
    b64 = b.to(tl.int64)
    y += b64 * y_b + h * BLOCK
    key += b64 * key_b + (h // GROUP) * key_h
    acc = tl.zeros((M, WIDE), tl.float32)
    low = tl.program_id(2) * keys_per_span
    high = tl.minimum(num_keys, low + keys_per_span)
    if CAUSAL:
        high = tl.minimum(high, first_row + M + shift)
    for first_key in range(low, high, K):
        keys = first_key + tl.arange(0, K)[None, :]
        k = load_rows(key, key_t, first_key, num_keys, E, K, WIDE)
        inside = (rows < num_rows) & (keys < tl.cdiv(num_keys, BLOCK) * BLOCK)
        ds = tl.load(y + places(rows, first_key, y_t, HEADS, K), inside, 0.0)
        ds = tl.where(sees(rows, keys, num_rows, num_keys, shift, CAUSAL), ds, 0.0)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    columns = tl.arange(0, WIDE)[None, :]
    at = grad_query + tl.program_id(2) * grad_s + b64 * grad_b + h * grad_h
    at += rows.to(tl.int64) * grad_t + columns
    acc *= scale * tl.load(unit)
    tl.store(at, acc.to(grad_query.dtype.element_ty), (rows < num_rows) & (columns < E))


@triton.jit
def add_rows(
    acc_k, acc_v, x, y, query, grad_out, first_row, first_key, num_rows, num_keys, shift,
    heads, x_t, query_t, out_t,
    E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr,
    BORDER: tl.constexpr, CAUSAL: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dA^T Q and P^T dO with some rows added; a tile on the BORDER has keys none wrote."""
    rows, keys = first_row + tl.arange(0, M)[:, None], first_key + tl.arange(0, K)[None, :]
    q = load_rows(query, query_t, first_row, num_rows, E, M, WIDE)
    do = load_rows(grad_out, out_t, first_row, num_rows, V, M, WIDE_V)
    at = places(rows, first_key, x_t, heads, K)
    inside = (rows < num_rows) & (keys < tl.cdiv(num_keys, BLOCK) * BLOCK)
    weight, ds = tl.load(x + at, inside, 0.0), tl.load(y + at, inside, 0.0)
    if BORDER:
        seen = sees(rows, keys, num_rows, num_keys, shift, CAUSAL)
        weight, ds = tl.where(seen, weight, 0.0), tl.where(seen, ds, 0.0)
    acc_v = tl.dot(tl.trans(weight.to(do.dtype)), do, acc_v, input_precision=PRECISION)
    return tl.dot(tl.trans(ds.to(q.dtype)), q, acc_k, input_precision=PRECISION), acc_v


@triton.jit
def grad_key_value_kernel(
    x, y, query, grad_out, unit, grad_key, grad_value,
    keys_stored, num_rows, num_keys, shift, scale,
    x_b, x_t, query_b, query_h, query_t, out_b, out_h, out_t,
    gk_b, gk_h, gk_t, gv_b, gv_h, gv_t,
    KV_HEADS, GROUP, E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr,
    CAUSAL: tl.constexpr, M: tl.constexpr, K: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store, or ADD, dK = unit scale dA^T Q and dV = unit P^T dO of a group; grid (keys Hkv, B)."""
    b, kv = tl.program_id(1), tl.program_id(0) % KV_HEADS
    first_key = tl.program_id(0) // KV_HEADS * K
    b64 = b.to(tl.int64)
    acc_k = tl.zeros((K, WIDE), tl.float32)
    acc_v = tl.zeros((K, WIDE_V), tl.float32)
    low, whole = 0, 0  # the first rows that see any, and all, of these keys
    if CAUSAL:
        low = tl.maximum(0, first_key - shift) // M * M
        whole = tl.maximum(low, tl.cdiv(tl.maximum(0, first_key + K - 1 - shift), M) * M)
    for member in range(GROUP):
        h = kv * GROUP + member
        q_base = query + b64 * query_b + h * query_h
        do_base = grad_out + b64 * out_b + h * out_h
        at = b64 * x_b + h * BLOCK
        for first_row in range(low, tl.minimum(whole, num_rows), M):
            acc_k, acc_v = add_rows(
                acc_k, acc_v, x + at, y + at, q_base, do_base, first_row, first_key,
                num_rows, num_keys, shift, KV_HEADS * GROUP, x_t, query_t, out_t,
                E, WIDE, V, WIDE_V, True, CAUSAL, M, K, PRECISION,
            )  # fmt: skip
        for first_row in range(whole, num_rows, M):
            acc_k, acc_v = add_rows(
                acc_k, acc_v, x + at, y + at, q_base, do_base, first_row, first_key,
                num_rows, num_keys, shift, KV_HEADS * GROUP, x_t, query_t, out_t,
                E, WIDE, V, WIDE_V, False, CAUSAL, M, K, PRECISION,
            )  # fmt: skip
    factor = tl.load(unit)
    acc_k *= scale * factor
    acc_v *= factor
    keys = first_key + tl.arange(0, K)[:, None]
    columns, columns_v = tl.arange(0, WIDE)[None, :], tl.arange(0, WIDE_V)[None, :]
    at_k = grad_key + b64 * gk_b + kv * gk_h + keys.to(tl.int64) * gk_t + columns
    at_v = grad_value + b64 * gv_b + kv * gv_h + keys.to(tl.int64) * gv_t + columns_v
    inside_k, inside_v = (
        (keys < keys_stored) & (columns < E),
        (keys < keys_stored) & (columns_v < V),
    )
    if ADD:
        acc_k += tl.load(at_k, inside_k, 0.0)
        acc_v += tl.load(at_v, inside_v, 0.0)
    tl.store(at_k, acc_k.to(grad_key.dtype.element_ty), inside_k)
    tl.store(at_v, acc_v.to(grad_value.dtype.element_ty), inside_v)
