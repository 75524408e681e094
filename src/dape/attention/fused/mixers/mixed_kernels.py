"""Triton kernels that mix heads by tables over the distance; `tiles` has the legend.

A tile that moves along a diagonal meets equal entries of U and C all the way. The entries are
loaded once, and the gradients are summed in registers before a single reduction.
"""

import triton
import triton.language as tl

from dape.attention.fused.across_heads import (
    add_dot,
    add_or_store,
    in_parts,
    load_hidden,
    load_static,
    load_weights,
    places_of_heads,
    rise,
    tile_positions,
)
from dape.attention.fused.sums_kernels import added, folded
from dape.attention.fused.tiles import LOG2E, diagonal_tiles, follow, unwanted


@triton.jit
def mlp(x_NH, w1_HD, rest_HD, w2_DH, one_HH, u_ND, PRECISION: tl.constexpr):
    """Return z = W1 x + u, r = phi(z) - phi(u) and y = x + W2 r of `[N, H]` scores.

    W1 comes in two parts. The residual is a product with the identity `one`, since x has the layout
    of a product's input.
    """
    w_ND = add_dot(x_NH, w1_HD, rest_HD, tl.zeros_like(u_ND), PRECISION)
    r_ND = rise(w_ND, u_ND).to(x_NH.dtype)
    y_NH = x_NH if x_NH.dtype == tl.float32 else tl.dot(x_NH, one_HH, input_precision=PRECISION)
    return w_ND + u_ND, r_ND, tl.dot(r_ND, w2_DH, y_NH, input_precision=PRECISION)


@triton.jit
def mix_kernel(
    x, w1, w2, hidden_table, mask,
    num_rows, num_keys, table_size, first_diagonal, band_tile, offset, x_b, x_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """X <- X + W2 (phi(W1 X + U) - phi(U)), -inf if unseen; grid (diagonals, B, segments)."""
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    delta_ij = q * K + offset + n // K - n % K
    u_ND = load_hidden(hidden_table, delta_ij, units, table_size, D)
    w1_HD, w2_HD = load_weights(w1, w2, heads, units, H, D)
    w_in_HD, rest_HD = in_parts(w1_HD, compute)
    w_out_DH = tl.trans(w2_HD.to(compute))
    one_HH = (heads[:, None] == heads[None, :]).to(compute)
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys, M, K)
    for tile in range(first, last):
        rows, keys, there, seen = tile_positions(
            tile, start, n, delta_ij, num_rows, num_keys, mask + b * mask_b,
            M, K, CAUSAL, MASKED,
        )  # fmt: skip
        at = b.to(tl.int64) * x_b + places_of_heads(rows, keys, heads, x_t, H)
        inside = there[:, None] & (heads[None, :] < H)
        a_NH = tl.where(seen[:, None], tl.load(x + at, inside, 0.0), 0.0)
        _z, _rise, y_NH = mlp(a_NH, w_in_HD, rest_HD, w_out_DH, one_HH, u_ND, PRECISION)
        s_NH = tl.where(seen[:, None], y_NH, float("-inf"))
        tl.store(x + at, s_NH.to(compute), inside)


@triton.jit
def mix_backward_kernel(
    x, y, w1, w2, hidden_table, static_table, lse, mask,
    sums, num_rows, num_keys, table_size, first_diagonal, band_tile, offset, slots, slot_size,
    x_b, x_t, stat_b, stat_h, stat_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr, ADD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """X <- P, Y <- dA along a diagonal, and partial sums of the gradients of all weights.

    Y is dP - delta, dS = P Y, dh = W2^T dS, dz = phi'(z) dh, dA = dS + W1^T dz. The gradient of U
    is dz. The gradient of W2 is dS r^T for r = phi(z) - phi(U), beside the gradient through C. Grid
    (diagonals, B, segments). Bands add to the slot of a segment, and slots are added in a fixed
    order.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    delta_ij = q * K + offset + n // K - n % K
    u_ND = load_hidden(hidden_table, delta_ij, units, table_size, D)
    c_NH = load_static(static_table, delta_ij, heads, table_size, H)
    w1_HD, w2_HD = load_weights(w1, w2, heads, units, H, D)
    w1_HD, rest_HD = in_parts(w1_HD, compute)
    w2_HD = w2_HD.to(compute)
    one_HH = (heads[:, None] == heads[None, :]).to(compute)
    sum_u_ND = tl.zeros((M * K, UNITS), tl.float32)
    sum_c_NH = tl.zeros((M * K, HEADS), tl.float32)
    sum_w1_DH = tl.zeros((UNITS, HEADS), tl.float32)
    sum_w2_HD = tl.zeros((HEADS, UNITS), tl.float32)
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
        a_NH = tl.where(seen[:, None], tl.load(x + at, inside, 0.0), 0.0)
        dp_NH = tl.where(seen[:, None], tl.load(y + at, inside, 0.0), 0.0).to(tl.float32)
        z_ND, r_ND, s_NH = mlp(a_NH, w1_HD, rest_HD, tl.trans(w2_HD), one_HH, u_ND, PRECISION)
        s_NH = s_NH.to(compute).to(tl.float32) + c_NH  # rounded as in the forward pass
        stat = b * stat_b + heads[None, :] * stat_h + rows[:, None] * stat_t
        log_sum_NH = tl.load(lse + stat, seen_heads, 0.0)
        p_NH = tl.where(seen_heads, tl.exp2((s_NH - log_sum_NH) * LOG2E), 0.0)
        ds_NH = p_NH * dp_NH
        dh_ND = tl.dot(ds_NH.to(compute), w2_HD, input_precision=PRECISION)
        dz_ND = tl.where(z_ND > 0, dh_ND, 0.01 * dh_ND)
        da_NH = tl.dot(dz_ND.to(compute), tl.trans(w1_HD), ds_NH, input_precision=PRECISION)
        tl.store(x + at, p_NH.to(compute), inside)
        tl.store(y + at, da_NH.to(compute), inside)
        sum_w2_HD = tl.dot(tl.trans(ds_NH.to(compute)), r_ND, sum_w2_HD, input_precision=PRECISION)
        sum_w1_DH = tl.dot(tl.trans(dz_ND.to(compute)), a_NH, sum_w1_DH, input_precision=PRECISION)
        sum_u_ND += dz_ND
        sum_c_NH += ds_NH
    slot = (b * tl.num_programs(2) + tl.program_id(2)) * slots + tl.program_id(0)
    sums += slot.to(tl.int64) * slot_size
    # A product with zeros and a 1 on every diagonal sums a tile along diagonals.
    lines = tl.arange(0, LINES)
    pick_LN = (lines[:, None] == (n // K - n % K + K - 1)[None, :]).to(tl.float32)
    at_u = lines[:, None] * UNITS + units[None, :]
    add_or_store(sums + at_u, tl.dot(pick_LN, sum_u_ND, input_precision="tf32x3"), ADD)
    sums += LINES * UNITS
    at_c = heads[None, :] * LINES + lines[:, None]
    add_or_store(sums + at_c, tl.dot(pick_LN, sum_c_NH, input_precision="tf32x3"), ADD)
    sums += LINES * HEADS
    add_or_store(sums + heads[None, :] * UNITS + units[:, None], sum_w1_DH, ADD)
    sums += UNITS * HEADS
    add_or_store(sums + heads[:, None] * UNITS + units[None, :], sum_w2_HD, ADD)


@triton.jit
def gradients_kernel(
    sums, unit, static, hidden, w1, w2, terms, slots, term_size, slot_size, lowest, step, count,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    LINES: tl.constexpr, SPANS: tl.constexpr, SLOTS: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, TERMS: tl.constexpr, OF_HEAD: tl.constexpr, TERMS_OF_HEAD: tl.constexpr,
    gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Add up all slots, times `unit`, into the gradients of W1 and W2, of U, and of C.

    The grid is (entries of both weights, then distances of U, ROWS of them in a program, then
    distances of a head of C, OF_HEAD of them).
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    WEIGHTS: tl.constexpr = HEADS * UNITS
    TABLES: tl.constexpr = LINES * (HEADS + UNITS)
    factor = tl.load(unit)
    place = tl.program_id(0)
    of_hidden = place - 2 * WEIGHTS // OUT
    of_static = of_hidden - tl.cdiv(count, ROWS)
    if of_hidden < 0:
        n = place * OUT + tl.arange(0, OUT)
        of_weights = added(sums + TABLES, n, terms * slots, slot_size, SLOTS, OUT) * factor
        head, d = n % WEIGHTS // UNITS, n % UNITS
        inside = (head < H) & (d < D)
        tl.store(w1 + d * H + head, of_weights, inside & (n < WEIGHTS))
        tl.store(w2 + head * D + d, of_weights, inside & (n >= WEIGHTS))
    elif of_static < 0:
        row, units = of_hidden * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, UNITS)[None, :]
        of_units = folded(
            sums, terms, slots, LINES, lowest, step, count, D, term_size, slot_size, UNITS, 1,
            of_hidden * ROWS, 0, SPANS, False, ROWS, UNITS, TERMS,
        )  # fmt: skip
        at_u = hidden + row.to(tl.int64) * D + units
        tl.store(at_u, of_units * factor, (row < count) & (units < D))
    else:
        across = tl.cdiv(count, OF_HEAD)
        h, first = of_static // across, of_static % across * OF_HEAD
        line = first + tl.arange(0, OF_HEAD)[:, None]
        of_line = folded(
            sums + LINES * UNITS, terms, slots, LINES, lowest, step, count, H, term_size, slot_size,
            1, LINES, first, h, SPANS, False, OF_HEAD, 1, TERMS_OF_HEAD,
        )  # fmt: skip
        tl.store(static + h.to(tl.int64) * count + line, of_line * factor, line < count)
