"""Triton kernels that mix heads by tables over the features of FIRE; `tiles` has the legend.

    mix              X <- X + W2 phi(W1 X + U f) + C f
    mix_backward     X <- P, Y <- dA from Y = dO V^T - delta; gradients of psi, scale, v and c

with `f = (1, relu(v x + c))` of `x = psi[|i - j|] scale[max(i, j)]` at every query and key. A tile
that moves along a diagonal meets equal psi all the way. Without hidden units, D = 0, the logits are
X + C f. Tables begin with the constant feature 1, which kernels keep apart.
"""

import triton
import triton.language as tl

from dape.attention.fused.across_heads import (
    add_dot,
    add_or_store,
    in_parts,
    load_feature_tables,
    load_weights,
    places_of_heads,
    tile_positions,
)
from dape.attention.fused.sums_kernels import added, folded
from dape.attention.fused.tiles import LOG2E, diagonal_tiles, follow, unwanted


@triton.jit
def feature_mlp(
    x_NH, f_NF, f_rest_NF, w1_HD, w1_rest_HD, w2_DH, one_HH, u_FD, u_rest_FD, c_FH, u_D, c_H,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return z = W1 x + U f, phi(z) and y = x + W2 phi(z) + C f; if D = 0, y is x + C f.

    f, W1 and U come in two parts.
    """
    y_NH = tl.dot(x_NH, one_HH, input_precision=PRECISION) + c_H[None, :]
    y_NH = tl.dot(f_NF, c_FH, y_NH, input_precision=PRECISION)
    z_ND, h_ND = y_NH, x_NH
    if D > 0:
        z_ND = tl.zeros((x_NH.shape[0], u_D.shape[0]), tl.float32) + u_D[None, :]
        z_ND = add_dot(x_NH, w1_HD, w1_rest_HD, z_ND, PRECISION)
        z_ND = add_dot(f_NF, u_FD, u_rest_FD, z_ND, PRECISION)
        if x_NH.dtype != tl.float32:
            z_ND = tl.dot(f_rest_NF, u_FD, z_ND, input_precision=PRECISION)
        h_ND = tl.where(z_ND > 0, z_ND, 0.01 * z_ND).to(x_NH.dtype)
        y_NH = tl.dot(h_ND, w2_DH, y_NH, input_precision=PRECISION)
    return z_ND, h_ND, y_NH


@triton.jit
def fire_mix_kernel(
    x, w1, w2, hidden_table, static_table, psi, scale, weight, bias, mask,
    num_rows, num_keys, table_size, first_diagonal, band_tile, offset, x_b, x_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FEATURES: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """X <- X + W2 phi(W1 X + U f) + C f along a diagonal, -inf if unseen; grid (diagonals, B)."""
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    places = tl.arange(0, FEATURES)
    delta_ij = q * K + offset + n // K - n % K
    u_FD, c_FH, u_D, c_H = load_feature_tables(
        hidden_table, static_table, heads, units, places, H, D, F
    )
    u_FD, u_rest_FD = in_parts(u_FD, compute)
    c_FH = c_FH.to(compute)
    w1_HD, w2_HD = load_weights(w1, w2, heads, units, H, D)
    w1_HD, w1_rest_HD = in_parts(w1_HD, compute)
    w2_DH = tl.trans(w2_HD.to(compute))
    one_HH = (heads[:, None] == heads[None, :]).to(compute)
    v_F = tl.load(weight + places, places < F, 0.0)[None, :]
    c_F = tl.load(bias + places, places < F, 0.0)[None, :]
    along_N = tl.load(psi + tl.abs(delta_ij), tl.abs(delta_ij) < table_size, 0.0)
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys, M, K)
    for tile in range(first, last):
        rows, keys, there, seen = tile_positions(
            tile, start, n, delta_ij, num_rows, num_keys, mask + b * mask_b,
            M, K, CAUSAL, MASKED,
        )  # fmt: skip
        live = there & (keys < num_keys)
        x_N = along_N * tl.load(scale + keys + tl.maximum(delta_ij, 0), live, 0.0)
        f_NF, f_rest_NF = in_parts(tl.maximum(v_F * x_N[:, None] + c_F, 0.0), compute)
        at = b.to(tl.int64) * x_b + places_of_heads(rows, keys, heads, x_t, H)
        inside = there[:, None] & (heads[None, :] < H)
        a_NH = tl.where(seen[:, None], tl.load(x + at, inside, 0.0), 0.0)
        _z, _hidden, y_NH = feature_mlp(
            a_NH, f_NF, f_rest_NF, w1_HD, w1_rest_HD, w2_DH, one_HH, u_FD, u_rest_FD, c_FH,
            u_D, c_H, D, PRECISION,
        )  # fmt: skip
        s_NH = tl.where(seen[:, None], y_NH, float("-inf"))
        tl.store(x + at, s_NH.to(compute), inside)


@triton.jit
def fire_mix_backward_kernel(
    x, y, w1, w2, hidden_table, static_table, psi, scale, weight, bias, lse, mask,
    sums, grad_scale,
    num_rows, num_keys, table_size, first_diagonal, band_tile, offset, slots, slot_size,
    x_b, x_t, stat_b, stat_h, stat_t, mask_b, pair_b, pair_t,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FEATURES: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """X <- P, Y <- dA along a diagonal, and partial sums of all gradients; grid (diagonals, B).

    dS and dz as in `mix_backward_kernel`; df = C^T dS + U^T dz where f > 0, dx = v . df, and
    dpsi += dx scale along the diagonal. Rows cross diagonals, so dx psi, the summand of dscale, is
    stored for every query and key.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    places = tl.arange(0, FEATURES)
    delta_ij = q * K + offset + n // K - n % K
    u_FD, c_FH, u_D, c_H = load_feature_tables(
        hidden_table, static_table, heads, units, places, H, D, F
    )
    u_FD, u_rest_FD = in_parts(u_FD, compute)
    c_FH = c_FH.to(compute)
    w1_HD, w2_HD = load_weights(w1, w2, heads, units, H, D)
    w1_HD, w1_rest_HD = in_parts(w1_HD, compute)
    w2_HD = w2_HD.to(compute)
    one_HH = (heads[:, None] == heads[None, :]).to(compute)
    v_F = tl.load(weight + places, places < F, 0.0)[None, :]
    c_F = tl.load(bias + places, places < F, 0.0)[None, :]
    along_N = tl.load(psi + tl.abs(delta_ij), tl.abs(delta_ij) < table_size, 0.0)
    sum_w1_DH = tl.zeros((UNITS, HEADS), tl.float32)
    sum_w2_HD = tl.zeros((HEADS, UNITS), tl.float32)
    sum_u_FD = tl.zeros((FEATURES, UNITS), tl.float32)
    sum_u_D = tl.zeros((UNITS,), tl.float32)
    sum_c_FH = tl.zeros((FEATURES, HEADS), tl.float32)
    sum_c_H = tl.zeros((HEADS,), tl.float32)
    sum_v_F = tl.zeros((FEATURES,), tl.float32)
    sum_bias_F = tl.zeros((FEATURES,), tl.float32)
    sum_psi_N = tl.zeros((M * K,), tl.float32)
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys, M, K)
    for tile in range(first, last):
        rows, keys, there, seen = tile_positions(
            tile, start, n, delta_ij, num_rows, num_keys, mask + b * mask_b,
            M, K, CAUSAL, MASKED,
        )  # fmt: skip
        live = there & (keys < num_keys)
        inside, seen_heads = (
            there[:, None] & (heads[None, :] < H),
            seen[:, None] & (heads[None, :] < H),
        )
        across_N = tl.load(scale + keys + tl.maximum(delta_ij, 0), live, 0.0)
        x_N = (along_N * across_N)[:, None]
        f_NF = tl.maximum(v_F * x_N + c_F, 0.0)
        positive_NF = f_NF > 0
        f_NF, f_rest_NF = in_parts(f_NF, compute)
        at = b.to(tl.int64) * x_b + places_of_heads(rows, keys, heads, x_t, H)
        a_NH = tl.where(seen[:, None], tl.load(x + at, inside, 0.0), 0.0)
        dp_NH = tl.where(seen[:, None], tl.load(y + at, inside, 0.0), 0.0).to(tl.float32)
        z_ND, h_ND, s_NH = feature_mlp(
            a_NH, f_NF, f_rest_NF, w1_HD, w1_rest_HD, tl.trans(w2_HD), one_HH, u_FD, u_rest_FD,
            c_FH, u_D, c_H, D, PRECISION,
        )  # fmt: skip
        s_NH = s_NH.to(compute).to(tl.float32)  # rounded as in the forward pass
        stat = b * stat_b + heads[None, :] * stat_h + rows[:, None] * stat_t
        log_sum_NH = tl.load(lse + stat, seen_heads, 0.0)
        p_NH = tl.where(seen_heads, tl.exp2((s_NH - log_sum_NH) * LOG2E), 0.0)
        ds_NH = p_NH * dp_NH
        lean_NH = ds_NH.to(compute)
        df_NF = tl.dot(lean_NH, tl.trans(c_FH), input_precision=PRECISION)
        da_NH = ds_NH
        if D > 0:
            dh_ND = tl.dot(lean_NH, w2_HD, input_precision=PRECISION)
            dz_ND = tl.where(z_ND > 0, dh_ND, 0.01 * dh_ND)
            lean_ND = dz_ND.to(compute)
            da_NH = tl.dot(lean_ND, tl.trans(w1_HD), ds_NH, input_precision=PRECISION)
            df_NF = tl.dot(lean_ND, tl.trans(u_FD), df_NF, input_precision=PRECISION)
            sum_w2_HD = tl.dot(tl.trans(lean_NH), h_ND, sum_w2_HD, input_precision=PRECISION)
            sum_w1_DH = tl.dot(tl.trans(lean_ND), a_NH, sum_w1_DH, input_precision=PRECISION)
            sum_u_FD = tl.dot(tl.trans(f_NF), lean_ND, sum_u_FD, input_precision=PRECISION)
            sum_u_D += tl.sum(dz_ND, 0)
        tl.store(x + at, p_NH.to(compute), inside)
        tl.store(y + at, da_NH.to(compute), inside)
        sum_c_FH = tl.dot(tl.trans(f_NF), lean_NH, sum_c_FH, input_precision=PRECISION)
        sum_c_H += tl.sum(ds_NH, 0)
        df_NF = tl.where(positive_NF, df_NF, 0.0)
        sum_v_F += tl.sum(df_NF * x_N, 0)
        sum_bias_F += tl.sum(df_NF, 0)
        dx_N = tl.sum(df_NF * v_F, 1)
        sum_psi_N += dx_N * across_N
        at = b.to(tl.int64) * pair_b + rows.to(tl.int64) * pair_t + keys
        tl.store(grad_scale + at, dx_N * along_N, live)
    sums += (b * slots + tl.program_id(0)).to(tl.int64) * slot_size
    HIDDEN: tl.constexpr = (FEATURES + 1) * UNITS
    WEIGHTS: tl.constexpr = HIDDEN + (FEATURES + 1) * HEADS
    ALONE: tl.constexpr = WEIGHTS + 2 * HEADS * UNITS
    if D > 0:
        add_or_store(sums + units, sum_u_D, True)
        add_or_store(sums + (places[:, None] + 1) * UNITS + units[None, :], sum_u_FD, True)
        at_w = sums + WEIGHTS
        add_or_store(at_w + heads[None, :] * UNITS + units[:, None], sum_w1_DH, True)
        add_or_store(at_w + (heads[:, None] + HEADS) * UNITS + units[None, :], sum_w2_HD, True)
    add_or_store(sums + HIDDEN + heads, sum_c_H, True)
    add_or_store(sums + HIDDEN + (places[:, None] + 1) * HEADS + heads[None, :], sum_c_FH, True)
    add_or_store(sums + ALONE + places, sum_v_F, True)
    add_or_store(sums + ALONE + FEATURES + places, sum_bias_F, True)
    lines = tl.arange(0, LINES)
    on_line = lines[:, None] == (n // K - n % K + K - 1)[None, :]
    summed_L = tl.sum(tl.where(on_line, sum_psi_N[None, :], 0.0), 1)
    add_or_store(sums + ALONE + 2 * FEATURES + lines, summed_L, True)


@triton.jit
def feature_gradients_kernel(
    sums, scale_sums, unit, static, hidden, w1, w2, psi, scale, weight, bias,
    terms, slots, term_size, slot_size, lowest, step, distances, indices,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FEATURES: tl.constexpr,
    LINES: tl.constexpr, SPANS: tl.constexpr, SLOTS: tl.constexpr, OUT: tl.constexpr,
    DISTANCES: tl.constexpr, TERMS: tl.constexpr, gate, GATED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Add up all slots, times `unit`, into the gradients of tables and weights, psi and scale.

    The grid is (entries of a slot, then distances of psi, DISTANCES of them in a program, then
    indices of scale, OUT of them).
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    HIDDEN: tl.constexpr = (FEATURES + 1) * UNITS
    STATIC: tl.constexpr = (FEATURES + 1) * HEADS
    WEIGHTS: tl.constexpr = HEADS * UNITS
    ALL: tl.constexpr = HIDDEN + STATIC + 2 * WEIGHTS + 2 * FEATURES
    factor = tl.load(unit)
    place = tl.program_id(0)
    of_psi = place - tl.cdiv(ALL, OUT)
    of_scale = of_psi - tl.cdiv(distances, DISTANCES)
    if of_psi < 0:
        n = place * OUT + tl.arange(0, OUT)
        total = added(sums, n, terms * slots, slot_size, SLOTS, OUT) * factor
        f, d = n // UNITS, n % UNITS
        tl.store(hidden + f * D + d, total, (n < HIDDEN) & (f < F + 1) & (d < D))
        n -= HIDDEN
        f, h = n // HEADS, n % HEADS
        tl.store(static + h * (F + 1) + f, total, (n >= 0) & (f < F + 1) & (h < H))
        n -= STATIC
        h, d = n % WEIGHTS // UNITS, n % UNITS
        inside = (n >= 0) & (h < H) & (d < D)
        tl.store(w1 + d * H + h, total, inside & (n < WEIGHTS))
        tl.store(w2 + h * D + d, total, inside & (n >= WEIGHTS) & (n < 2 * WEIGHTS))
        n -= 2 * WEIGHTS
        f = n % FEATURES
        inside = (n >= 0) & (f < F)
        tl.store(weight + f, total, inside & (n < FEATURES))
        tl.store(bias + f, total, inside & (n >= FEATURES) & (n < 2 * FEATURES))
    elif of_scale < 0:
        first = of_psi * DISTANCES
        of_line = folded(
            sums + ALL, terms, slots, LINES, lowest, step, distances, 1,
            term_size, slot_size, 1, 1, first, 0, SPANS, False, DISTANCES, 1, TERMS,
        )  # fmt: skip
        line = first + tl.arange(0, DISTANCES)[:, None]
        tl.store(psi + line, of_line * factor, line < distances)
    else:
        n = of_scale * OUT + tl.arange(0, OUT)
        tl.store(scale + n, tl.load(scale_sums + n, n < indices, 0.0) * factor, n < indices)


@triton.jit
def add_pairs_kernel(
    pairs, total, batch, num_rows, num_keys, shift, pair_b, pair_t,
    CAUSAL: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, gate, GATED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Add the numbers of a row and WIDTH keys to `total`, by the later index; grid (indices).

    Indices are counted from the first key, and `shift` is the index of the first row.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    index, line = tl.program_id(0), tl.arange(0, K)
    row = index - shift
    total += index
    added_K = tl.zeros((K,), tl.float32)
    in_row = (row >= 0) & (row < num_rows)
    last_key = tl.cdiv(tl.where(in_row, tl.minimum(num_keys, index + 1), 0), WIDTH)
    last_row = tl.where(index < num_keys, tl.minimum(num_rows, row), 0)
    at_row, at_key = pairs + row.to(tl.int64) * pair_t, pairs + index
    for _element in range(batch):
        for first in range(0, last_key, K):
            keys = first + line
            added_K += tl.load(at_row + keys, keys < last_key, 0.0)
        if not CAUSAL:
            for first in range(0, last_row, K):
                rows = first + line
                added_K += tl.load(at_key + rows.to(tl.int64) * pair_t, rows < last_row, 0.0)
        at_row += pair_b
        at_key += pair_b
    tl.store(total, tl.load(total) + tl.sum(added_K, 0))
