"""Triton kernel of decoding: few queries against many keys, all heads of a span in a program.

A tile has K keys against C columns (h, m), the heads of M rows. Every key head is multiplied with
all columns, and products with columns of foreign heads are dropped. A tensor core takes sixteen
columns at least, and reading the keys costs most. A single loop runs over the key heads of all
tiles, with the keys of a tile and the values of the tile before. Loads are therefore under way at
every time, also while the heads of a tile mix. `tiles` has the legend.
"""

import triton
import triton.language as tl

from dape.attention.fused.across_heads import load_feature_tables, load_hidden, load_static, rise
from dape.attention.fused.table_kernels import bias_values, load_out, load_tap
from dape.attention.fused.tiles import LOG2E, follow, sees, store_output, tile_at, turns, unwanted

# Sizes that change with every token. Triton would compile a further kernel for multiples of 16.
GROWING = ("num_keys", "table_size", "shift")


@triton.jit
def tables_at(
    distance, heads, units, p0, p1, b1, b2, span, count, v_DH, w2_HD,
    H: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr, ON_BIAS: tl.constexpr,
):  # fmt: skip
    """Return B `[H]`, U `[D]`, and b2 + W2 phi(U) `[H]`, at a distance, in float32."""
    n = distance + tl.arange(0, 1)
    b_NH, _x, _y = bias_values(p0, p0, p1, n, heads, count, span, H, FORM, False, ROWS)
    b_H = tl.sum(b_NH, 0)
    u_D = tl.load(b1 + units, units < D, 0.0).to(tl.float32)
    if ON_BIAS >= 0:
        u_D += tl.sum(v_DH * b_H[None, :], 1)
    phi_D = tl.where(u_D > 0, u_D, 0.01 * u_D)
    b2_H = tl.load(b2 + heads, heads < H, 0.0).to(tl.float32)
    return b_H, u_D, b2_H + tl.sum(w2_HD * phi_D[None, :], 1)


@triton.jit
def made_tables(
    distance, heads, p0, p1, span, count, v_DH, w2_HD, b_H, u_D, c_H, H: tl.constexpr,
    FORM: tl.constexpr, ROWS: tl.constexpr, ON_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Return U `[D, N]` and C `[H, N]` of a form at distances, as `tables_kernel` makes them.

    Products in TF32 keep fewer digits than float32. They have only what differs from a bias B0 of
    the same span, whose `tables_at` are U0 and C0: U = U0 + V (B - B0), and C likewise.
    """
    b_NH, _x, _y = bias_values(p0, p0, p1, distance, heads, count, span, H, FORM, False, ROWS)
    b_HN = tl.trans(b_NH)
    u_DN = tl.zeros((u_D.shape[0], b_HN.shape[1]), tl.float32) + u_D[:, None]
    if ON_BIAS >= 0:
        u_DN = tl.dot(v_DH, b_HN - b_H[:, None], u_DN, input_precision="tf32x3")
    c_HN = tl.zeros_like(b_HN) + c_H[:, None]
    if RESIDUAL:
        c_HN += b_HN
    phi_DN = tl.where(u_DN > 0, u_DN, 0.01 * u_DN)
    phi_D = tl.where(u_D > 0, u_D, 0.01 * u_D)
    return u_DN, tl.dot(w2_HD, phi_DN - phi_D[:, None], c_HN, input_precision="tf32x3")


@triton.jit
def tables_of_features(delta, index, psi, index_scale, count, v_F, c_F, u_DF, c_HF, u_D, c_H):
    """Return U `[D, N]` and C `[H, N]` of features; `index` is max(i, j)."""
    x_N = tl.load(psi + tl.abs(delta), tl.abs(delta) < count, 0.0)
    x_N *= tl.load(index_scale + index, index < count, 0.0)
    f_FN = tl.maximum(v_F[:, None] * x_N[None, :] + c_F[:, None], 0.0)
    u_DN = tl.zeros((u_D.shape[0], x_N.shape[0]), tl.float32) + u_D[:, None]
    c_HN = tl.zeros((c_H.shape[0], x_N.shape[0]), tl.float32) + c_H[:, None]
    u_DN = tl.dot(u_DF, f_FN, u_DN, input_precision="tf32x3")
    return u_DN, tl.dot(c_HF, f_FN, c_HN, input_precision="tf32x3")


@triton.jit
def logits(x_HN, u_DN, c_HN, w1_DH, w2_HD, FEATURED: tl.constexpr):
    """Return logits A + C + W2 phi(W1 A + U) of scores A, less W2 phi(U) unless FEATURED."""
    r_DN = tl.dot(w1_DH, x_HN, input_precision="tf32x3")
    r_DN = tl.maximum(r_DN + u_DN, 0.01 * (r_DN + u_DN)) if FEATURED else rise(r_DN, u_DN)
    return tl.dot(w2_HD, r_DN, x_HN + c_HN, input_precision="tf32x3")


@triton.jit
def softmax(s_CK, top_C, total_C, acc_CV):
    """Return P of logits by the largest logit so far, that logit, and both sums by that logit."""
    new_top_C = tl.maximum(top_C, tl.max(s_CK, 1))
    safe_C = tl.where(new_top_C == float("-inf"), 0.0, new_top_C)
    p_CK = tl.exp2((s_CK - safe_C[:, None]) * LOG2E)
    shrink_C = tl.exp2((top_C - safe_C) * LOG2E)
    return p_CK, new_top_C, total_C * shrink_C + tl.sum(p_CK, 1), acc_CV * shrink_C[:, None]


@triton.jit(do_not_specialize=GROWING)
def decode_kernel(
    query, key, value, w1, w2, hidden, static, p0, p1, span, psi, index_scale, v, c,
    table_size, mask, out, lse, rest, num_rows, num_keys, channels, shift, scale, keys_per_span,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    out_s, out_b, out_h, out_t, lse_s, lse_b, lse_h, mask_b,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr,
    V: tl.constexpr, WIDE_V: tl.constexpr,
    FORM: tl.constexpr, ROWS: tl.constexpr, ON_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    F: tl.constexpr, FEATURES: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    EXACT: tl.constexpr, RESTED: tl.constexpr, gate, GATED: tl.constexpr, FLAGS: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """O = softmax(S) V of logits S = A + C + W2 (phi(W1 A + U) - phi(U)); grid (rows, spans, B).

    `hidden` and `static` are U and C over the distance. With a FORM of the bias, which has few
    parameters, the program makes its own part of U and C, and `hidden` and `static` are b1 and b2.
    With F features of FIRE U and C are over features, and C lacks W2 phi(U) as `terms` says.
    W1 has `channels` columns, first the scores. If EXACT, the rounding error of P meets V too. If
    FLAGS, `gate` becomes 1.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    if FLAGS:
        tl.store(gate, 1)
    b64 = tl.program_id(2).to(tl.int64)
    mask += b64 * mask_b
    low = tl.program_id(1) * keys_per_span
    key += b64 * key_b + low.to(tl.int64) * key_t
    value += b64 * value_b + low.to(tl.int64) * value_t
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    columns, dims, dims_v = tl.arange(0, HEADS * M), tl.arange(0, WIDE), tl.arange(0, WIDE_V)
    head, k = columns // M, tl.arange(0, K)
    key_at = k[:, None].to(tl.int64) * key_t + dims[None, :]
    value_at = k[:, None].to(tl.int64) * value_t + dims_v[None, :]
    w1_DH = tl.trans(load_tap(w1, 0, 0, heads, units, channels, H, D, 1))
    w2_HD = load_out(w2, heads, units, H, D)
    if FORM is not None:
        v_DH = w1_DH
        if ON_BIAS >= 0:
            v_DH = tl.trans(load_tap(w1, 0, ON_BIAS, heads, units, channels, H, D, 1))
        b_H, u_D, c_H = tables_at(  # from the first row to the first key
            tl.abs(shift - low), heads, units, p0, p1, hidden, static, span, table_size,
            v_DH, w2_HD, H, D, FORM, ROWS, ON_BIAS,
        )  # fmt: skip
    if F > 0:
        places = tl.arange(0, FEATURES)
        u_FD, c_FH, u_D, c_H = load_feature_tables(hidden, static, heads, units, places, H, D, F)
        u_DF, c_HF = tl.trans(u_FD), tl.trans(c_FH)
        v_F = tl.load(v + places, places < F, 0.0)
        c_F = tl.load(c + places, places < F, 0.0)
    for turn in range(turns(tl.cdiv(num_rows, M), GATED)):
        first_row = tile_at(turn) * M
        high = tl.minimum(num_keys, low + keys_per_span)
        if CAUSAL:
            high = tl.minimum(high, first_row + M + shift)
        size = tl.maximum(high - low, 0)
        rows = first_row + columns % M
        stored = (rows < num_rows) & (head < H)
        at = b64 * query_b + head.to(tl.int64) * query_h + rows.to(tl.int64) * query_t
        inside = stored[:, None] & (dims < E)[None, :]
        q_CE = tl.load(query + at[:, None] + dims[None, :], inside, 0.0)
        top_C = tl.full((HEADS * M,), float("-inf"), tl.float32)
        total_C = tl.zeros((HEADS * M,), tl.float32)
        acc_CV = tl.zeros((HEADS * M, WIDE_V), tl.float32)
        x_CK = tl.zeros((HEADS * M, K), tl.float32)
        rounded_CK = tl.zeros((HEADS * M, K), value.dtype.element_ty)
        left_CK = rounded_CK
        last = tl.cdiv(size, K) * KV_HEADS
        for step in range(0, last + KV_HEADS):
            kv, start = tl.cast(step % KV_HEADS, tl.int64), step // KV_HEADS * K
            behind = tl.cast(start - K, tl.int64)
            ahead = key + kv * key_h + (behind + K) * key_t
            k_KE = tl.load(ahead + key_at, (k < size - start)[:, None] & (dims < E)[None, :], 0.0)
            count = tl.where(start > 0, size - start + K, 0)
            real = (k < count)[:, None] & (dims_v < V)[None, :]
            v_KV = tl.load(value + kv * value_h + behind * value_t + value_at, real, 0.0)
            of_kv = (head // GROUP == kv)[:, None]
            a_CK = tl.dot(q_CE, tl.trans(k_KE), input_precision=PRECISION)
            x_CK = tl.where(of_kv, a_CK, x_CK)
            added_CV = tl.dot(rounded_CK, v_KV, acc_CV, input_precision=PRECISION)
            if EXACT:
                added_CV = tl.dot(left_CK, v_KV, added_CV, input_precision=PRECISION)
            acc_CV = tl.where(of_kv, added_CV, acc_CV)
            if (kv == KV_HEADS - 1) & (step < last):
                first_key = low + start
                delta_ij = first_row + n // K + shift - (first_key + n % K)
                if F > 0:
                    u_DN, c_HN = tables_of_features(
                        delta_ij, first_key + n % K + tl.maximum(delta_ij, 0), psi, index_scale,
                        table_size, v_F, c_F, u_DF, c_HF, u_D, c_H,
                    )  # fmt: skip
                elif FORM is None:
                    u_DN = tl.trans(load_hidden(hidden, delta_ij, units, table_size, D))
                    c_HN = tl.trans(load_static(static, delta_ij, heads, table_size, H))
                else:
                    u_DN, c_HN = made_tables(
                        tl.abs(delta_ij), heads, p0, p1, span, table_size, v_DH, w2_HD,
                        b_H, u_D, c_H, H, FORM, ROWS, ON_BIAS, RESIDUAL,
                    )  # fmt: skip
                x_HN = tl.reshape(x_CK * scale, (HEADS, M * K))
                s_HN = logits(x_HN, u_DN, c_HN, w1_DH, w2_HD, F > 0)
                s_CK = tl.reshape(s_HN, (HEADS * M, K))
                keys = first_key + k
                seen = sees(rows[:, None], keys[None, :], num_rows, num_keys, shift, CAUSAL)
                if MASKED:
                    seen &= tl.load(mask + keys, keys < num_keys, 0)[None, :] != 0
                s_CK = tl.where(seen, s_CK, float("-inf"))
                p_CK, top_C, total_C, acc_CV = softmax(s_CK, top_C, total_C, acc_CV)
                rounded_CK = p_CK.to(value.dtype.element_ty)
                left_CK = (p_CK - rounded_CK.to(tl.float32)).to(value.dtype.element_ty)
        total_C = tl.where(total_C > 0, total_C, 1.0)
        acc_CV /= total_C[:, None]
        at = tl.program_id(1).to(tl.int64) * out_s + b64 * out_b + head.to(tl.int64) * out_h
        at += rows.to(tl.int64) * out_t
        inside = stored[:, None] & (dims_v < V)[None, :]
        store_output(out, rest, at[:, None] + dims_v[None, :], acc_CV, inside, RESTED)
        at = tl.program_id(1) * lse_s + b64 * lse_b + head * lse_h + rows
        tl.store(lse + at, top_C + tl.log(total_C), stored)
