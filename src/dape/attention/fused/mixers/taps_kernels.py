"""Triton kernels that mix heads by convolutions along the keys; `tiles` has the legend.

    hidden           Z <- phi(b1 + sum_t W1_t X[j + t - r] + U_t)   r = k // 2, 0 where unseen
    mix              X <- X + sum_t W2_t Z[j + t - r] + C
    mix_backward     P, and Y <- dS from Y = dO V^T - delta
    hidden_backward  Z <- dZ from dS, and the gradients of U and b1
    grad_scores      Y <- dA from dZ and dS

A column of Z is a position of hidden units. There are r more columns than keys. A row sees columns
up to r past its own index. Columns before the first visible key are zero. A layer is one product of
a position with all its taps side by side. A tile is loaded once for each tap, after the first from
the cache. Tiles exchange data through Z alone, and the kernels are therefore one more than the
layers. The units of a column are padded and stand side by side in Z, so that a shift along the keys
moves whole vectors.

Weights are `[T D, H]` and `[H, T D]`. U is over the distance of the key that a tap meets.
"""

import triton
import triton.language as tl

from dape.attention.fused.across_heads import (
    add_dot,
    add_or_store,
    in_parts,
    lies,
    load_static,
    places_of_heads,
)
from dape.attention.fused.sums_kernels import added, folded
from dape.attention.fused.tiles import BLOCK, LOG2E, diagonal_tiles, follow, unwanted


@triton.jit
def load_layer(
    weight, per_tap, per_input, per_output, outputs, T: tl.constexpr, INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return a layer, or its transpose, as `[taps, inputs]` against outputs, zeros as padding."""
    lines = tl.arange(0, TAPS * WIDTH)
    tap, channel = (lines // WIDTH)[:, None], (lines % WIDTH)[:, None]
    inside = (tap < T) & (channel < INPUTS) & (outputs[None, :] < OUTPUTS)
    at = tap * per_tap + channel * per_input + outputs[None, :] * per_output
    return tl.load(weight + at, inside, 0.0)


@triton.jit
def sees(rows, keys, num_rows, num_keys, shift, mask, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """Return whether rows may see keys, given as several keys for each row."""
    seen = (rows < num_rows) & (keys >= 0) & (keys < num_keys)
    if MASKED:
        seen &= tl.load(mask + keys, seen, 0) != 0
    if CAUSAL:
        seen &= keys <= rows + shift
    return seen


@triton.jit
def sees_all(
    q, tile, start, offset, num_keys, T: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return whether every row of a tile of columns sees the keys of all taps."""
    first = start + tile * M - T // 2
    seen = (first >= 0) & (first + K + T - 2 < num_keys)
    if CAUSAL:
        seen &= q * K + offset - K + 1 >= T - 1
    if MASKED:
        seen = False
    return seen


@triton.jit
def load_taps(
    at, inside, channels, STEP: tl.constexpr, COUNT: tl.constexpr,
    N: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the channels, STEP apart, at addresses `[N, taps]` as `[N, taps WIDTH]`."""
    at = at[:, :, None] + channels[None, None, :] * STEP
    found_NTC = tl.load(at, inside[:, :, None] & (channels < COUNT)[None, None, :], 0.0)
    return tl.reshape(found_NTC, (N, TAPS * WIDTH))


@triton.jit
def in_scores(rows, keys, row_size, H: tl.constexpr):
    """Return the offset of the first head of keys `[N, taps]` of some rows in the scratch."""
    return rows[:, None].to(tl.int64) * row_size + keys // BLOCK * (BLOCK * H) + keys % BLOCK


@triton.jit
def in_hidden(rows, columns, row_size, UNITS: tl.constexpr):
    """Return the offset of the first unit of columns, one or several for each row, in Z."""
    return rows.to(tl.int64) * row_size + columns * UNITS


@triton.jit
def hidden_kernel(
    x, z, w1, hidden_table, bias, mask, started,
    num_rows, num_keys, shift, table_size, first_diagonal, band_tile, offset,
    x_b, x_t, z_b, z_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    TAPS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
    gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Z <- phi(b1 + sum_t W1_t X + U_t) along one diagonal of columns; grid (diagonals, B, parts).

    `started` is the first key of each element that the mask shows.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    taps = tl.arange(0, TAPS)
    x += b.to(tl.int64) * x_b
    z += b.to(tl.int64) * z_b
    mask += b * mask_b
    start_key = tl.load(started + b) if MASKED else 0
    # The distance to the key of tap t is r - t more than the distance to the column.
    line = q * K + offset + n // K - n % K
    distance = tl.abs(line[:, None] - taps[None, :])
    inside = (distance < table_size) & (taps < T)[None, :]
    entries = hidden_table + distance * (T * D) + taps[None, :] * D
    u_NTD = tl.load(
        entries[:, :, None] + units[None, None, :],
        inside[:, :, None] & (units < D)[None, None, :], 0.0,
    )  # fmt: skip
    w1_THD = load_layer(w1, D * H, 1, H, units, T, H, D, TAPS, HEADS)
    w1_THD, rest_THD = in_parts(w1_THD, compute)
    b1_D = tl.load(bias + units, units < D, 0.0)[None, :]
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys + T // 2, M, K)
    for tile in range(first, last):
        rows, columns = tile * M + n // K, start + tile * M + n % K
        there = (rows < num_rows) & (columns >= 0) & (columns < num_keys + T // 2)
        keys = columns[:, None] + taps[None, :] - T // 2
        seen = (taps < T)[None, :] & sees(
            rows[:, None], keys, num_rows, num_keys, shift, mask, CAUSAL, MASKED
        )
        a_NTH = load_taps(
            x + in_scores(rows, keys, x_t, H), seen, heads, BLOCK, H, M * K, TAPS, HEADS
        )
        u_ND = tl.sum(tl.where(seen[:, :, None], u_NTD, 0.0), 1)
        z_ND = add_dot(a_NTH, w1_THD, rest_THD, u_ND + b1_D, PRECISION)
        z_ND = tl.where(z_ND > 0, z_ND, 0.01 * z_ND)
        z_ND = tl.where((columns >= start_key)[:, None], z_ND, 0.0)
        at = in_hidden(rows, columns, z_t, UNITS)[:, None] + units[None, :]
        tl.store(z + at, z_ND.to(compute), there[:, None])


@triton.jit
def logits(
    x, z, w2_TDH, c_NH, rows, keys, num_rows, num_keys, shift, mask, x_t, z_t, heads, units, taps,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, UNITS: tl.constexpr, TAPS: tl.constexpr,
    N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the visible pairs, their offsets, the hidden units of their taps, and logits."""
    seen = sees(rows, keys, num_rows, num_keys, shift, mask, CAUSAL, MASKED)
    at = places_of_heads(rows, keys, heads, x_t, H)
    inside = seen[:, None] & (heads[None, :] < H)
    columns = keys[:, None] + taps[None, :] - T // 2
    there = seen[:, None] & (columns >= 0) & (taps < T)[None, :]
    at_taps = z + in_hidden(rows[:, None], columns, z_t, UNITS)
    z_NTD = load_taps(at_taps, there, units, 1, UNITS, N, TAPS, UNITS)
    a_NH = tl.load(x + at, inside, 0.0).to(tl.float32)
    return inside, at, z_NTD, tl.dot(z_NTD, w2_TDH, a_NH + c_NH, input_precision=PRECISION)


@triton.jit
def convolution_mix_kernel(
    x, z, w2, static_table, mask, counted, counted_end,
    num_rows, num_keys, shift, table_size, first_diagonal, band_tile, offset,
    x_b, x_t, z_b, z_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    TAPS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
    gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """X <- X + sum_t W2_t Z + C along one diagonal, -inf if unseen; grid (diagonals, B, parts).

    Keys from `counted` to its end have a weight.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    taps = tl.arange(0, TAPS)
    x += b.to(tl.int64) * x_b
    z += b.to(tl.int64) * z_b
    mask += b * mask_b
    c_NH = load_static(static_table, q * K + offset + n // K - n % K, heads, table_size, H)
    w2_TDH = load_layer(w2, D, 1, T * D, heads, T, D, H, TAPS, UNITS).to(compute)
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys, M, K)
    for tile in range(first, last):
        rows, keys = tile * M + n // K, start + tile * M + n % K
        inside, at, _hidden, s_NH = logits(
            x, z, w2_TDH, c_NH, rows, keys, num_rows, num_keys, shift, mask, x_t, z_t,
            heads, units, taps, H, D, T, UNITS, TAPS, M * K, CAUSAL, MASKED, PRECISION,
        )  # fmt: skip
        there = lies(rows, keys, num_rows, num_keys)
        inside &= ((keys >= counted) & (keys < counted_end))[:, None]
        s_NH = tl.where(inside, s_NH, float("-inf")).to(compute)
        tl.store(x + at, s_NH, there[:, None] & (heads[None, :] < H))


@triton.jit
def place_of_slot(b, slots, slot_size):
    """Return where the slot of a program begins."""
    segment = b * tl.num_programs(2) + tl.program_id(2)
    return (segment * slots + tl.program_id(0)).to(tl.int64) * slot_size


@triton.jit
def along_diagonals(at, sums_NC, n, K: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr):
    """Add the sums `[N, WIDTH]` of a tile, by its diagonals, to a slot `[LINES, WIDTH]`."""
    lines, columns = tl.arange(0, LINES), tl.arange(0, WIDTH)
    pick_LN = (lines[:, None] == (n // K - n % K + K - 1)[None, :]).to(tl.float32)
    at += lines[:, None] * WIDTH + columns[None, :]
    add_or_store(at, tl.dot(pick_LN, sums_NC, input_precision="tf32x3"), True)


@triton.jit
def convolution_backward_kernel(
    x, p, y, z, w2, static_table, lse, mask, grad_static, grad_w2, counted, counted_end,
    num_rows, num_keys, shift, table_size, first_diagonal, band_tile, offset, slots, slot_size,
    x_b, x_t, z_b, z_t, stat_b, stat_h, stat_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    TAPS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """P, and Y <- dS = P Y, along one diagonal; sums of C and W2; grid as `mix`."""
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    taps = tl.arange(0, TAPS)
    b64 = b.to(tl.int64)
    x += b64 * x_b
    p += b64 * x_b
    y += b64 * x_b
    z += b64 * z_b
    mask += b * mask_b
    c_NH = load_static(static_table, q * K + offset + n // K - n % K, heads, table_size, H)
    w2_TDH = load_layer(w2, D, 1, T * D, heads, T, D, H, TAPS, UNITS).to(compute)
    sum_c_NH = tl.zeros((M * K, HEADS), tl.float32)
    sum_w2_TDH = tl.zeros((TAPS * UNITS, HEADS), tl.float32)
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys, M, K)
    for tile in range(first, last):
        rows, keys = tile * M + n // K, start + tile * M + n % K
        inside, at, z_NTD, s_NH = logits(
            x, z, w2_TDH, c_NH, rows, keys, num_rows, num_keys, shift, mask, x_t, z_t,
            heads, units, taps, H, D, T, UNITS, TAPS, M * K, CAUSAL, MASKED, PRECISION,
        )  # fmt: skip
        s_NH = s_NH.to(compute).to(tl.float32)  # as the forward pass stored it
        inside &= ((keys >= counted) & (keys < counted_end))[:, None]
        stat = b * stat_b + heads[None, :] * stat_h + rows[:, None] * stat_t
        log_sum_NH = tl.load(lse + stat, inside, 0.0)
        p_NH = tl.where(inside, tl.exp2((s_NH - log_sum_NH) * LOG2E), 0.0)
        ds_NH = (p_NH * tl.load(y + at, inside, 0.0).to(tl.float32)).to(compute)
        there = lies(rows, keys, num_rows, num_keys)
        stored = there[:, None] & (heads[None, :] < H)
        tl.store(p + at, p_NH.to(compute), stored)
        tl.store(y + at, ds_NH, stored)
        sum_c_NH += ds_NH
        sum_w2_TDH = tl.dot(tl.trans(z_NTD), ds_NH, sum_w2_TDH, input_precision=PRECISION)
    slot = place_of_slot(b, slots, slot_size)
    along_diagonals(grad_static + slot, sum_c_NH, n, K, LINES, HEADS)
    at = tl.arange(0, TAPS * UNITS)[:, None] * HEADS + heads[None, :]
    add_or_store(grad_w2 + slot + at, sum_w2_TDH, True)


@triton.jit
def hidden_backward_kernel(
    y, z, w2, mask, started, grad_hidden, grad_bias,
    num_rows, num_keys, shift, first_diagonal, band_tile, offset, slots, slot_size,
    x_b, x_t, z_b, z_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    TAPS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Z <- dZ = phi'(Z) sum_t W2_t^T dS[j + r - t]; sums of U and b1; grid as `hidden`."""
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    compute = y.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    taps = tl.arange(0, TAPS)
    y += b.to(tl.int64) * x_b
    z += b.to(tl.int64) * z_b
    mask += b * mask_b
    start_key = tl.load(started + b) if MASKED else 0
    w2_THD = load_layer(w2, D, T * D, 1, units, T, H, D, TAPS, HEADS).to(compute)
    sum_u_NTD = tl.zeros((M * K, TAPS, UNITS), tl.float32)
    sum_all_ND = tl.zeros((M * K, UNITS), tl.float32)  # of tiles whose taps are all visible
    sum_b_D = tl.zeros((UNITS,), tl.float32)
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys + T // 2, M, K)
    for tile in range(first, last):
        rows, columns = tile * M + n // K, start + tile * M + n % K
        there = (rows < num_rows) & (columns >= 0) & (columns < num_keys + T // 2)
        keys = columns[:, None] + T // 2 - taps[None, :]
        seen = (taps < T)[None, :] & sees(
            rows[:, None], keys, num_rows, num_keys, shift, mask, CAUSAL, MASKED
        )
        ds_NTH = load_taps(
            y + in_scores(rows, keys, x_t, H), seen, heads, BLOCK, H, M * K, TAPS, HEADS
        )
        at = in_hidden(rows, columns, z_t, UNITS)[:, None] + units[None, :]
        inside = there[:, None]
        z_ND = tl.load(z + at, inside, 0.0)
        dz_ND = tl.dot(ds_NTH, w2_THD, input_precision=PRECISION)
        dz_ND = tl.where(z_ND > 0, dz_ND, 0.01 * dz_ND)
        dz_ND = tl.where(inside & (columns >= start_key)[:, None], dz_ND, 0.0)
        tl.store(z + at, dz_ND.to(compute), inside)
        keys = columns[:, None] + taps[None, :] - T // 2
        seen = (taps < T)[None, :] & sees(
            rows[:, None], keys, num_rows, num_keys, shift, mask, CAUSAL, MASKED
        )
        if sees_all(q, tile, start, offset, num_keys, T, M, K, CAUSAL, MASKED):
            sum_all_ND += dz_ND
        else:
            sum_u_NTD += tl.where(seen[:, :, None], dz_ND[:, None, :], 0.0)
        sum_b_D += tl.sum(dz_ND, 0)
    slot = place_of_slot(b, slots, slot_size)
    sums = tl.reshape(sum_u_NTD + sum_all_ND[:, None, :], (M * K, TAPS * UNITS))
    along_diagonals(grad_hidden + slot, sums, n, K, LINES, TAPS * UNITS)
    add_or_store(grad_bias + slot + units, sum_b_D, True)


@triton.jit
def grad_scores_kernel(
    x, y, z, w1, mask, grad_w1,
    num_rows, num_keys, shift, first_diagonal, band_tile, slots, slot_size,
    x_b, x_t, z_b, z_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    TAPS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
    gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Y <- dA = dS + sum_t W1_t^T dZ[j + r - t] along one diagonal; sums of W1; grid as `mix`."""
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    taps = tl.arange(0, TAPS)
    x += b.to(tl.int64) * x_b
    y += b.to(tl.int64) * x_b
    z += b.to(tl.int64) * z_b
    mask += b * mask_b
    w1_TDH = load_layer(w1, D * H, H, 1, heads, T, D, H, TAPS, UNITS).to(compute)
    sum_w1_TDH = tl.zeros((TAPS * UNITS, HEADS), tl.float32)
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys, M, K)
    for tile in range(first, last):
        rows, keys = tile * M + n // K, start + tile * M + n % K
        seen = sees(rows, keys, num_rows, num_keys, shift, mask, CAUSAL, MASKED)
        at = places_of_heads(rows, keys, heads, x_t, H)
        inside = seen[:, None] & (heads[None, :] < H)
        a_NH = tl.load(x + at, inside, 0.0)
        columns = keys[:, None] + T // 2 - taps[None, :]
        there = seen[:, None] & (columns >= 0) & (taps < T)[None, :]
        at_taps = z + in_hidden(rows[:, None], columns, z_t, UNITS)
        dz_NTD = load_taps(at_taps, there, units, 1, UNITS, M * K, TAPS, UNITS)
        da_NH = tl.load(y + at, inside, 0.0).to(tl.float32)
        da_NH = tl.dot(dz_NTD, w1_TDH, da_NH, input_precision=PRECISION)
        stored = lies(rows, keys, num_rows, num_keys)
        da_NH = tl.where(inside, da_NH, 0.0).to(compute)
        tl.store(y + at, da_NH, stored[:, None] & (heads[None, :] < H))
        sum_w1_TDH = tl.dot(tl.trans(dz_NTD), a_NH, sum_w1_TDH, input_precision=PRECISION)
    slot = place_of_slot(b, slots, slot_size)
    at = tl.arange(0, TAPS * UNITS)[:, None] * HEADS + heads[None, :]
    add_or_store(grad_w1 + slot + at, sum_w1_TDH, True)


@triton.jit
def taps_gradients_kernel(
    sums, unit, static, hidden, w1, w2, b1, terms, slots, term_size, slot_size,
    lowest, lowest_hidden, step, count,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    TAPS: tl.constexpr, LINES: tl.constexpr, SPANS: tl.constexpr, SLOTS: tl.constexpr,
    OUT: tl.constexpr, ROWS: tl.constexpr, TERMS: tl.constexpr, ROWS_OF_TAP: tl.constexpr,
    TERMS_OF_TAP: tl.constexpr, gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Add up all slots, times `unit`, into the gradients of W1, W2 and b1, of U, and of C.

    The grid is (entries of the layers, then distances of a tap of U, ROWS_OF_TAP of them in a
    program, then distances of C, ROWS of them).
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    STATIC: tl.constexpr = LINES * HEADS
    TABLES: tl.constexpr = STATIC + LINES * TAPS * UNITS
    LAYER: tl.constexpr = TAPS * UNITS * HEADS
    factor = tl.load(unit)
    place = tl.program_id(0)
    of_hidden = place - tl.cdiv(2 * LAYER + UNITS, OUT)
    across = tl.cdiv(count, ROWS_OF_TAP)
    of_static = of_hidden - T * across
    if of_hidden < 0:
        n = place * OUT + tl.arange(0, OUT)
        total = added(sums + TABLES, n, terms * slots, slot_size, SLOTS, OUT) * factor
        tap, d, h = n % LAYER // (UNITS * HEADS), n // HEADS % UNITS, n % HEADS
        inside = (tap < T) & (d < D) & (h < H)
        channel = tap * D + d
        tl.store(w1 + channel * H + h, total, inside & (n < LAYER))
        tl.store(w2 + h * T * D + channel, total, inside & (n >= LAYER) & (n < 2 * LAYER))
        n -= 2 * LAYER
        tl.store(b1 + n, total, (n >= 0) & (n < D))
    elif of_static < 0:
        tap, first = of_hidden // across, of_hidden % across * ROWS_OF_TAP
        row, units = first + tl.arange(0, ROWS_OF_TAP)[:, None], tl.arange(0, UNITS)[None, :]
        of_units = folded(
            sums + STATIC + tap * UNITS, terms, slots, LINES, lowest_hidden - tap, step, count, D,
            term_size, slot_size, TAPS * UNITS, 1, first, 0, SPANS, False,
            ROWS_OF_TAP, UNITS, TERMS_OF_TAP,
        )  # fmt: skip
        at_u = hidden + row.to(tl.int64) * T * D + tap * D + units
        tl.store(at_u, of_units * factor, (row < count) & (units < D))
    else:
        first = of_static * ROWS
        row, heads = first + tl.arange(0, ROWS)[:, None], tl.arange(0, HEADS)[None, :]
        of_heads = folded(
            sums, terms, slots, LINES, lowest, step, count, H, term_size, slot_size, HEADS, 1,
            first, 0, SPANS, False, ROWS, HEADS, TERMS,
        )  # fmt: skip
        at_c = static + heads.to(tl.int64) * count + row
        tl.store(at_c, of_heads * factor, (row < count) & (heads < H))
