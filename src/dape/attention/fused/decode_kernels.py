"""Triton kernel of decoding: few queries against many keys, all heads of a span in a program.

A tile has K keys against C columns (m, h), the heads of M rows. Every key head is multiplied with
all columns, and products with columns of foreign heads are dropped. A tensor core takes eight
columns at least, and reading the keys costs most. Logits are `[K, C]` and outputs `[V, C]`, with
the statistics of the softmax along C. Between the two loops over key heads all numbers stay in
registers. `tiles` has the legend.
"""

import triton
import triton.language as tl

from dape.attention.fused.across_heads import load_hidden, load_static, rise
from dape.attention.fused.table_kernels import bias_values, load_out, load_tap
from dape.attention.fused.tiles import LOG2E, load_rows, store_output, unwanted

# Sizes that change with every token. Triton would compile a further kernel for multiples of 16.
GROWING = ("num_keys", "table_size", "shift")


@triton.jit
def made_tables(
    b_NH, w1, w2_DH, b1_D, b2_H, heads, units, channels,
    H: tl.constexpr, D: tl.constexpr, ON_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Return U `[N, D]` and C `[N, H]` of biases, as `tables_kernel` makes them."""
    u_ND = tl.zeros((b_NH.shape[0], b1_D.shape[0]), tl.float32) + b1_D[None, :]
    if ON_BIAS >= 0:
        v_HD = load_tap(w1, 0, ON_BIAS, heads, units, channels, H, D, 1)
        u_ND = tl.dot(b_NH, v_HD, u_ND, input_precision="ieee")
    c_NH = tl.zeros_like(b_NH) + b2_H[None, :]
    if RESIDUAL:
        c_NH += b_NH
    phi_ND = tl.where(u_ND > 0, u_ND, 0.01 * u_ND)
    return u_ND, tl.dot(phi_ND, w2_DH, c_NH, input_precision="ieee")


# A single key head, known at compile time, makes the loop over keys the innermost. Triton would
# then load tables ahead, in more shared memory than a GPU has.
@triton.jit(do_not_specialize=(*GROWING, "KV_HEADS"))
def decode_kernel(
    query, key, value, w1, w2, hidden, static, p0, p1, span, mask, out, lse, rest,
    num_rows, num_keys, table_size, channels, shift, scale, keys_per_span,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    out_s, out_b, out_h, out_t, lse_s, lse_b, lse_h, mask_b,
    KV_HEADS, GROUP, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr,
    FORM: tl.constexpr, ROWS: tl.constexpr, ON_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, RESTED: tl.constexpr,
    gate, GATED: tl.constexpr, FLAGS: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = softmax(S) V of logits S = A + C + W2 (phi(W1 A + U) - phi(U)); grid (rows, spans, B).

    `hidden` and `static` are U and C over the distance. With a FORM of the bias, which has few
    parameters, the program makes its own part of U and C, and `hidden` and `static` are b1 and b2.
    W1 has `channels` columns, first the scores. If EXACT, the rounding error of P meets V too. If
    FLAGS, `gate` becomes 1.
    """
    if unwanted(gate, GATED):
        return
    if FLAGS:
        tl.store(gate, 1)
    b64 = tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) * M
    key += b64 * key_b
    value += b64 * value_b
    mask += b64 * mask_b
    low = tl.program_id(1) * keys_per_span
    high = tl.minimum(num_keys, low + keys_per_span)
    if CAUSAL:
        high = tl.minimum(high, first_row + M + shift)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, K * M)
    columns, dims = tl.arange(0, M * HEADS), tl.arange(0, WIDE)
    rows, head = first_row + columns // HEADS, columns % HEADS
    stored = (rows < num_rows) & (head < H)
    at = b64 * query_b + head.to(tl.int64) * query_h + rows.to(tl.int64) * query_t
    inside = stored[None, :] & (dims < E)[:, None]
    q_EC = tl.load(query + at[None, :] + dims[:, None], inside, 0.0)
    w1_HD = load_tap(w1, 0, 0, heads, units, channels, H, D, 1)
    w2_DH = tl.trans(load_out(w2, heads, units, H, D))
    if FORM is not None:
        b1_D = tl.load(hidden + units, units < D, 0.0).to(tl.float32)
        b2_H = tl.load(static + heads, heads < H, 0.0).to(tl.float32)
    top_C = tl.full((M * HEADS,), float("-inf"), tl.float32)
    total_C = tl.zeros((M * HEADS,), tl.float32)
    acc_VC = tl.zeros((WIDE_V, M * HEADS), tl.float32)
    for first_key in range(low, high, K):
        delta_ij = first_row + n % M + shift - (first_key + n // M)
        if FORM is None:
            u_ND = load_hidden(hidden, delta_ij, units, table_size, D)
            c_NH = load_static(static, delta_ij, heads, table_size, H)
        else:
            distance = tl.abs(delta_ij)
            b_NH, _x, _y = bias_values(
                p0, p0, p1, distance, heads, table_size, span, H, FORM, False, ROWS
            )
            u_ND, c_NH = made_tables(
                b_NH, w1, w2_DH, b1_D, b2_H, heads, units, channels, H, D, ON_BIAS, RESIDUAL
            )
        x_KC = tl.zeros((K, M * HEADS), tl.float32)
        head_keys = key
        for kv in range(KV_HEADS):
            k_KE = load_rows(head_keys, key_t, first_key, num_keys, E, K, WIDE)
            a_KC = tl.dot(k_KE, q_EC, input_precision=PRECISION)
            x_KC = tl.where((head // GROUP == kv)[None, :], a_KC, x_KC)
            head_keys += key_h
        x_KC = tl.reshape(x_KC * scale, (K * M, HEADS))
        r_ND = rise(tl.dot(x_KC, w1_HD, input_precision="tf32x3"), u_ND)
        s_KC = tl.dot(r_ND, w2_DH, x_KC + c_NH, input_precision="tf32x3")
        s_KC = tl.reshape(s_KC, (K, M * HEADS))
        keys = first_key + tl.arange(0, K)
        seen = keys < num_keys
        if MASKED:
            seen &= tl.load(mask + keys, seen, 0) != 0
        s_KC = tl.where(seen[:, None], s_KC, float("-inf"))
        if CAUSAL:
            s_KC = tl.where(keys[:, None] <= rows[None, :] + shift, s_KC, float("-inf"))
        new_top_C = tl.maximum(top_C, tl.max(s_KC, 0))
        safe_C = tl.where(new_top_C == float("-inf"), 0.0, new_top_C)
        p_KC = tl.exp2((s_KC - safe_C[None, :]) * LOG2E)
        shrink_C = tl.exp2((top_C - safe_C) * LOG2E)
        total_C = total_C * shrink_C + tl.sum(p_KC, 0)
        acc_VC *= shrink_C[None, :]
        rounded_KC = p_KC.to(value.dtype.element_ty)
        left_KC = (p_KC - rounded_KC.to(tl.float32)).to(value.dtype.element_ty)
        head_values = value
        for kv in range(KV_HEADS):
            v_KV = load_rows(head_values, value_t, first_key, num_keys, V, K, WIDE_V)
            added_VC = tl.dot(tl.trans(v_KV), rounded_KC, acc_VC, input_precision=PRECISION)
            if EXACT:
                added_VC = tl.dot(tl.trans(v_KV), left_KC, added_VC, input_precision=PRECISION)
            acc_VC = tl.where((head // GROUP == kv)[None, :], added_VC, acc_VC)
            head_values += value_h
        top_C = new_top_C
    total_C = tl.where(total_C > 0, total_C, 1.0)
    acc_VC /= total_C[None, :]
    dims_v = tl.arange(0, WIDE_V)
    at = tl.program_id(1).to(tl.int64) * out_s + b64 * out_b + head.to(tl.int64) * out_h
    at += rows.to(tl.int64) * out_t
    inside = stored[None, :] & (dims_v < V)[:, None]
    store_output(out, rest, at[None, :] + dims_v[:, None], acc_VC, inside, RESTED)
    at = tl.program_id(1) * lse_s + b64 * lse_b + head * lse_h + rows
    tl.store(lse + at, top_C + tl.log(total_C), stored)
