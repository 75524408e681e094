"""Triton kernel of a head for dQ, dK and dV of a band, from P and dA in its scratch.

    dQ += scale dA K                         rows of a head
    dK += scale dA^T Q, dV += P^T dO         keys of a key head

`bands_kernels` describes the scratch, and `tiles` has the legend.
"""

import triton
import triton.language as tl

from dape.attention.fused.bands_kernels import places
from dape.attention.fused.tiles import (
    BLOCK,
    follow,
    head_and_rows,
    load_rows,
    sees,
    tile_at,
    turns,
    unwanted,
)


@triton.jit
def store_sum(old, new, summed, rows, inside, x):
    """Store a gradient of some rows, plus the old sums of the first `summed` rows, if any."""
    if summed is not None:
        x += tl.load(old, inside & (rows < summed), 0.0)
    tl.store(new, x.to(new.dtype.element_ty), inside)


@triton.jit
def add_keys(
    dq_ME, y, key, first_row, first_key, num_rows, num_keys, shift, heads, y_t, key_t,
    E: tl.constexpr, WIDE: tl.constexpr, BORDER: tl.constexpr, CAUSAL: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dA K with some keys added; a tile on the BORDER has keys that some rows do not see."""
    rows, keys = first_row + tl.arange(0, M)[:, None], first_key + tl.arange(0, K)[None, :]
    k_KE = load_rows(key, key_t, first_key, num_keys, E, K, WIDE)
    inside = (rows < num_rows) & (keys < tl.cdiv(num_keys, BLOCK) * BLOCK)
    da_MK = tl.load(y + places(rows, first_key, y_t, heads, K), inside, 0.0)
    if BORDER:
        da_MK = tl.where(sees(rows, keys, num_rows, num_keys, shift, CAUSAL), da_MK, 0.0)
    return tl.dot(da_MK.to(k_KE.dtype), k_KE, dq_ME, input_precision=PRECISION)


@triton.jit
def grad_query(
    tile, y, key, old, new, summed, num_rows, num_keys, shift, factor,
    y_t, key_h, key_t, old_h, old_t, new_h, new_t,
    HEADS, GROUP, E: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dQ = factor dA K of a tile of rows of a head, with the old sum."""
    h, first_row = head_and_rows(tile, num_rows, HEADS, M)
    y, key = y + h * BLOCK, key + (h // GROUP) * key_h
    dq_ME = tl.zeros((M, WIDE), tl.float32)
    high = num_keys
    whole = num_keys // K * K  # the keys of tiles that all rows see
    if CAUSAL:
        high = tl.minimum(high, first_row + M + shift)
        whole = tl.minimum(whole, tl.maximum(0, first_row + shift + 1) // K * K)
    for first_key in range(0, whole, K):
        dq_ME = add_keys(
            dq_ME, y, key, first_row, first_key, num_rows, num_keys, shift,
            HEADS, y_t, key_t, E, WIDE, False, CAUSAL, M, K, PRECISION,
        )  # fmt: skip
    for first_key in range(whole, high, K):
        dq_ME = add_keys(
            dq_ME, y, key, first_row, first_key, num_rows, num_keys, shift,
            HEADS, y_t, key_t, E, WIDE, True, CAUSAL, M, K, PRECISION,
        )  # fmt: skip
    rows, columns = first_row + tl.arange(0, M)[:, None], tl.arange(0, WIDE)[None, :]
    at_old = old + h * old_h + rows.to(tl.int64) * old_t + columns
    at = new + h * new_h + rows.to(tl.int64) * new_t + columns
    inside = (rows < num_rows) & (columns < E)
    store_sum(at_old, at, summed, rows, inside, dq_ME * factor)


@triton.jit
def add_rows(
    dk_KE, dv_KV, x, y, query, grad_out, first_row, first_key, num_rows, num_keys, shift,
    heads, x_t, query_t, out_t,
    E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr,
    BORDER: tl.constexpr, CAUSAL: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dA^T Q and P^T dO with some rows added; a tile on the BORDER has keys none wrote."""
    rows, keys = first_row + tl.arange(0, M)[:, None], first_key + tl.arange(0, K)[None, :]
    q_ME = load_rows(query, query_t, first_row, num_rows, E, M, WIDE)
    do_MV = load_rows(grad_out, out_t, first_row, num_rows, V, M, WIDE_V)
    at = places(rows, first_key, x_t, heads, K)
    inside = (rows < num_rows) & (keys < tl.cdiv(num_keys, BLOCK) * BLOCK)
    p_MK, da_MK = tl.load(x + at, inside, 0.0), tl.load(y + at, inside, 0.0)
    if BORDER:
        seen = sees(rows, keys, num_rows, num_keys, shift, CAUSAL)
        p_MK, da_MK = tl.where(seen, p_MK, 0.0), tl.where(seen, da_MK, 0.0)
    dv_KV = tl.dot(tl.trans(p_MK.to(do_MV.dtype)), do_MV, dv_KV, input_precision=PRECISION)
    return tl.dot(tl.trans(da_MK.to(q_ME.dtype)), q_ME, dk_KE, input_precision=PRECISION), dv_KV


@triton.jit
def grad_key_value(
    tile, x, y, query, grad_out, old_key, new_key, old_value, new_value, summed,
    keys_stored, num_rows, num_keys, shift, factor, unit,
    x_t, query_h, query_t, out_h, out_t, gk_h, gk_t, gv_h, gv_t,
    HEADS, GROUP, E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr,
    CAUSAL: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dK = factor dA^T Q and dV = unit P^T dO of a tile of keys, with the old sums."""
    kv_heads = HEADS // GROUP
    kv, first_key = (tile % kv_heads).to(tl.int64), tile // kv_heads * K
    dk_KE = tl.zeros((K, WIDE), tl.float32)
    dv_KV = tl.zeros((K, WIDE_V), tl.float32)
    low, whole = 0, 0  # the first rows that see any key, and all keys
    if CAUSAL:
        low = tl.maximum(0, first_key - shift) // M * M
        whole = tl.maximum(low, tl.cdiv(tl.maximum(0, first_key + K - 1 - shift), M) * M)
    for member in range(GROUP):
        h = kv * GROUP + member
        q_base, do_base = query + h * query_h, grad_out + h * out_h
        for first_row in range(low, tl.minimum(whole, num_rows), M):
            dk_KE, dv_KV = add_rows(
                dk_KE, dv_KV, x + h * BLOCK, y + h * BLOCK, q_base, do_base, first_row, first_key,
                num_rows, num_keys, shift, HEADS, x_t, query_t, out_t,
                E, WIDE, V, WIDE_V, True, CAUSAL, M, K, PRECISION,
            )  # fmt: skip
        for first_row in range(whole, num_rows, M):
            dk_KE, dv_KV = add_rows(
                dk_KE, dv_KV, x + h * BLOCK, y + h * BLOCK, q_base, do_base, first_row, first_key,
                num_rows, num_keys, shift, HEADS, x_t, query_t, out_t,
                E, WIDE, V, WIDE_V, False, CAUSAL, M, K, PRECISION,
            )  # fmt: skip
    keys = first_key + tl.arange(0, K)[:, None]
    columns, columns_v = tl.arange(0, WIDE)[None, :], tl.arange(0, WIDE_V)[None, :]
    stored = keys < keys_stored
    at = kv * gk_h + keys.to(tl.int64) * gk_t + columns
    inside = stored & (columns < E)
    store_sum(old_key + at, new_key + at, summed, keys, inside, dk_KE * factor)
    at = kv * gv_h + keys.to(tl.int64) * gv_t + columns_v
    inside = stored & (columns_v < V)
    store_sum(old_value + at, new_value + at, summed, keys, inside, dv_KV * unit)


# Arguments without a kernel for every value.
@triton.jit(do_not_specialize=("summed_query", "summed"))
def grad_kernel(
    x, y, query, key, grad_out, unit, old_query, new_query, old_key, new_key, old_value, new_value,
    summed_query, summed, keys_stored, num_rows, num_keys, shift, scale,
    x_b, x_t, query_b, query_h, query_t, key_b, key_h, key_t, out_b, out_h, out_t,
    old_b, old_h, old_t, new_b, new_h, new_t, gk_b, gk_h, gk_t, gv_b, gv_h, gv_t,
    HEADS, GROUP, E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr,
    CAUSAL: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    gate, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Store dQ = unit scale dA K, dK = unit scale dA^T Q and dV = unit P^T dO, with old sums.

    The grid is (rows H + keys Hkv, B). Rows come first, since in a low and wide band a program of
    rows is longer than a program of keys.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    b64 = tl.program_id(1).to(tl.int64)
    factor = tl.load(unit)
    x += b64 * x_b
    y += b64 * x_b
    of_rows, of_keys = tl.cdiv(num_rows, M) * HEADS, tl.cdiv(keys_stored, K) * (HEADS // GROUP)
    for turn in range(turns(of_rows + of_keys, GATED)):
        tile = tile_at(turn)
        if tile < of_rows:
            grad_query(
                tile, y, key + b64 * key_b, old_query + b64 * old_b,
                new_query + b64 * new_b, summed_query, num_rows, num_keys, shift, scale * factor,
                x_t, key_h, key_t, old_h, old_t, new_h, new_t,
                HEADS, GROUP, E, WIDE, CAUSAL, M, K, PRECISION,
            )  # fmt: skip
        else:
            grad_key_value(
                tile - of_rows, x, y, query + b64 * query_b, grad_out + b64 * out_b,
                old_key + b64 * gk_b, new_key + b64 * gk_b,
                old_value + b64 * gv_b, new_value + b64 * gv_b, summed,
                keys_stored, num_rows, num_keys, shift, scale * factor, factor,
                x_t, query_h, query_t, out_h, out_t, gk_h, gk_t, gv_h, gv_t,
                HEADS, GROUP, E, WIDE, V, WIDE_V, CAUSAL, M, K, PRECISION,
            )  # fmt: skip
