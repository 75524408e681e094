"""Triton kernel of decoding: few queries against many keys, all heads of a span in one program.

A tile has K keys against columns (m, h), the heads of M rows. Each key head is multiplied with all
columns, and what belongs to other heads is dropped: a tensor core takes eight columns at least, and
reading the keys is what costs. Logits are `[K, M H]`, outputs `[V, M H]`, so that the statistics of
the softmax lie along the same axis; between the two loops over key heads all stays in registers.

Shapes: H query heads, Hkv key heads, E and V head dims, D hidden units. HEADS, UNITS and WIDE are
their padded sizes. Strides of span, batch, head and row come as `_s, _b, _h, _t`.
"""

import triton
import triton.language as tl

from dape.attention.fused.across_heads import load_hidden, load_static, load_weights, rise
from dape.attention.fused.tiles import LOG2E, load_rows, store_output, unwanted

# These change with every token: no kernel of its own for those that 16 divides.
GROWING = ("num_keys", "table_size", "shift")


@triton.jit(do_not_specialize=GROWING)
def decode_kernel(
    query, key, value, w1, w2, hidden_table, static_table, mask, out, lse, rest,
    num_rows, num_keys, table_size, shift, scale, keys_per_span,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    out_s, out_b, out_h, out_t, lse_s, lse_b, lse_h, mask_b,
    KV_HEADS, GROUP, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    EXACT: tl.constexpr, RESTED: tl.constexpr, gate, GATED: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = softmax(S) V of logits S = A + C + W2 (phi(W1 A + U) - phi(U)); grid (rows, spans, B).

    If EXACT, what rounding took from P meets V too.
    """
    if unwanted(gate, GATED):
        return
    b64 = tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) * M
    key += b64 * key_b
    value += b64 * value_b
    mask += b64 * mask_b
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, K * M)
    columns, dims = tl.arange(0, M * HEADS), tl.arange(0, WIDE)
    rows, head = first_row + columns // HEADS, columns % HEADS
    stored = (rows < num_rows) & (head < H)
    at = b64 * query_b + head.to(tl.int64) * query_h + rows.to(tl.int64) * query_t
    inside = stored[None, :] & (dims < E)[:, None]
    q = tl.load(query + at[None, :] + dims[:, None], inside, 0.0)
    w1_HD, w2_HD = load_weights(w1, w2, heads, units, H, D)
    w2_DH = tl.trans(w2_HD)
    top = tl.full((M * HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((M * HEADS,), tl.float32)
    acc = tl.zeros((WIDE_V, M * HEADS), tl.float32)
    low = tl.program_id(1) * keys_per_span
    high = tl.minimum(num_keys, low + keys_per_span)
    if CAUSAL:
        high = tl.minimum(high, first_row + M + shift)
    for first_key in range(low, high, K):
        delta_ij = first_row + n % M + shift - (first_key + n // M)
        u = load_hidden(hidden_table, delta_ij, units, table_size, D)
        c = load_static(static_table, delta_ij, heads, table_size, H)
        x = tl.zeros((K, M * HEADS), tl.float32)
        head_keys = key
        for kv in range(KV_HEADS):
            k = load_rows(head_keys, key_t, first_key, num_keys, E, K, WIDE)
            a = tl.dot(k, q, input_precision=PRECISION)
            x = tl.where((head // GROUP == kv)[None, :], a, x)
            head_keys += key_h
        x = tl.reshape(x * scale, (K * M, HEADS))
        r = rise(tl.dot(x, w1_HD, input_precision="tf32x3"), u)
        s = tl.dot(r, w2_DH, x + c, input_precision="tf32x3")
        s = tl.reshape(s, (K, M * HEADS))
        keys = first_key + tl.arange(0, K)
        seen = keys < num_keys
        if MASKED:
            seen &= tl.load(mask + keys, seen, 0) != 0
        s = tl.where(seen[:, None], s, float("-inf"))
        if CAUSAL:
            s = tl.where(keys[:, None] <= rows[None, :] + shift, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2((s - safe[None, :]) * LOG2E)
        shrink = tl.exp2((top - safe) * LOG2E)
        total = total * shrink + tl.sum(weight, 0)
        acc *= shrink[None, :]
        rounded = weight.to(value.dtype.element_ty)
        left = (weight - rounded.to(tl.float32)).to(value.dtype.element_ty)
        head_values = value
        for kv in range(KV_HEADS):
            v = load_rows(head_values, value_t, first_key, num_keys, V, K, WIDE_V)
            added = tl.dot(tl.trans(v), rounded, acc, input_precision=PRECISION)
            if EXACT:
                added = tl.dot(tl.trans(v), left, added, input_precision=PRECISION)
            acc = tl.where((head // GROUP == kv)[None, :], added, acc)
            head_values += value_h
        top = new_top
    total = tl.where(total > 0, total, 1.0)
    acc /= total[None, :]
    dims_v = tl.arange(0, WIDE_V)
    at = tl.program_id(1) * out_s + b64 * out_b + head.to(tl.int64) * out_h
    at += rows.to(tl.int64) * out_t
    inside = stored[None, :] & (dims_v < V)[:, None]
    store_output(out, rest, at[None, :] + dims_v[:, None], acc, inside, RESTED)
    at = tl.program_id(1) * lse_s + b64 * lse_b + head * lse_h + rows
    tl.store(lse + at, top + tl.log(total), stored)
