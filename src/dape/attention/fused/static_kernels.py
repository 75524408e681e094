"""Triton kernels of attention with a static bias: a head in a program, without a scratch.

The bias is a table over the distance. A tile has -inf where causality hides a key, and needs no
mask. For hidden keys (padding, an end within a tile), a line over the keys holds 0 or -inf,
`LINED`. `Rows` describes log-sum-exp and delta. `tiles` has the legend.
"""

import triton
import triton.language as tl

from dape.attention.fused.tiles import (
    LOG2E,
    diagonal_tiles,
    follow,
    head_and_rows,
    load_rows,
    store_output,
    toeplitz,
    toeplitz_pair,
)


@triton.jit
def logits(
    left, right, table, size, distance, line, keys, scale, A: tl.constexpr, B: tl.constexpr,
    KEYS_FIRST: tl.constexpr, CAUSAL: tl.constexpr, LINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return base-2 logits of a tile `[A, B]`; `scale` is in base 2 too."""
    s_AB = tl.dot(left, tl.trans(right), input_precision=PRECISION) * scale
    s_AB += toeplitz(table, size, distance, LOG2E, A, B, KEYS_FIRST, CAUSAL)
    if LINED:
        s_AB += tl.load(line + keys)
    return s_AB


@triton.jit
def forward_kernel(
    query, key, value, table, line, out, lse, rest,
    num_rows, num_keys, table_size, shift, scale, keys_per_span,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    out_s, out_b, out_h, out_t, lse_s, lse_b, lse_h, line_b,
    HEADS, GROUP, E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr,
    CAUSAL: tl.constexpr, LINED: tl.constexpr, RESTED: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """O = softmax(scale Q K^T + C) V of a head over a span of keys; grid (rows H, B, spans)."""
    follow(CHAINED)
    h, first_row = head_and_rows(tl.program_id(0), num_rows, HEADS, M)
    rows = first_row + tl.arange(0, M)
    b64 = tl.program_id(1).to(tl.int64)
    query += b64 * query_b + h * query_h
    key += b64 * key_b + (h // GROUP) * key_h
    value += b64 * value_b + (h // GROUP) * value_h
    table += h * table_size
    line += b64 * line_b
    q_ME = load_rows(query, query_t, first_row, num_rows, E, M, WIDE)
    top_M = tl.full((M,), float("-inf"), tl.float32)
    total_M = tl.zeros((M,), tl.float32)
    acc_MV = tl.zeros((M, WIDE_V), tl.float32)
    low = tl.program_id(2) * keys_per_span
    high = tl.minimum(num_keys, low + keys_per_span)
    if CAUSAL:
        high = tl.minimum(high, first_row + M + shift)
    for first_key in range(low, high, K):
        k_KE = load_rows(key, key_t, first_key, num_keys, E, K, WIDE)
        keys = first_key + tl.arange(0, K)[None, :]
        s_MK = logits(
            q_ME, k_KE, table, table_size, first_row + shift - first_key, line, keys, scale,
            M, K, False, CAUSAL, LINED, PRECISION,
        )  # fmt: skip
        new_top_M = tl.maximum(top_M, tl.max(s_MK, 1))
        safe_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
        p_MK = tl.exp2(s_MK - safe_M[:, None])
        shrink_M = tl.exp2(top_M - safe_M)
        total_M = total_M * shrink_M + tl.sum(p_MK, 1)
        v_KV = load_rows(value, value_t, first_key, num_keys, V, K, WIDE_V)
        acc_MV = tl.dot(
            p_MK.to(v_KV.dtype), v_KV, acc_MV * shrink_M[:, None], input_precision=PRECISION
        )
        top_M = new_top_M
    total_M = tl.where(total_M > 0, total_M, 1.0)
    acc_MV /= total_M[:, None]
    columns = tl.arange(0, WIDE_V)[None, :]
    at = tl.program_id(2).to(tl.int64) * out_s + b64 * out_b + h * out_h
    at += rows[:, None].to(tl.int64) * out_t + columns
    store_output(out, rest, at, acc_MV, (rows < num_rows)[:, None] & (columns < V), RESTED)
    at = tl.program_id(2) * lse_s + b64 * lse_b + h * lse_h + rows
    tl.store(lse + at, (top_M + tl.log2(total_M)) / LOG2E, rows < num_rows)


@triton.jit
def grad_query_kernel(
    query, key, value, grad_out, table, line, lse, delta, grad_lse, unit, grad_query,
    num_rows, num_keys, table_size, shift, scale,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    out_b, out_h, out_t, stat_b, stat_h, line_b, grad_b, grad_h, grad_t, wanted_b, wanted_h,
    HEADS, GROUP, E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr,
    CAUSAL: tl.constexpr, LINED: tl.constexpr, SUMMED: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Store dQ = unit scale dS K of a head, and correct delta; grid (rows H, B).

    A row of dS sums to the gradient of the log-sum-exp, zero unless SUMMED. The difference is the
    error of `delta` from the rounding of the output. The kernel takes the error off `delta`, before
    the sums along keys and diagonals.
    """
    follow(CHAINED)
    h, first_row = head_and_rows(tl.program_id(0), num_rows, HEADS, M)
    rows = first_row + tl.arange(0, M)
    b64 = tl.program_id(1).to(tl.int64)
    query += b64 * query_b + h * query_h
    grad_out += b64 * out_b + h * out_h
    key += b64 * key_b + (h // GROUP) * key_h
    value += b64 * value_b + (h // GROUP) * value_h
    table += h * table_size
    line += b64 * line_b
    q_ME = load_rows(query, query_t, first_row, num_rows, E, M, WIDE)
    do_MV = load_rows(grad_out, out_t, first_row, num_rows, V, M, WIDE_V)
    stat = b64 * stat_b + h * stat_h
    log_sum_M, shared_M = tl.load(lse + stat + rows), tl.load(delta + stat + rows)
    dq_ME = tl.zeros((M, WIDE), tl.float32)
    excess_M = tl.zeros((M,), tl.float32)
    high = num_keys
    if CAUSAL:
        high = tl.minimum(high, first_row + M + shift)
    for first_key in range(0, high, K):
        k_KE = load_rows(key, key_t, first_key, num_keys, E, K, WIDE)
        v_KV = load_rows(value, value_t, first_key, num_keys, V, K, WIDE_V)
        keys = first_key + tl.arange(0, K)[None, :]
        s_MK = logits(
            q_ME, k_KE, table, table_size, first_row + shift - first_key, line, keys, scale * LOG2E,
            M, K, False, CAUSAL, LINED, PRECISION,
        )  # fmt: skip
        dp_MK = tl.dot(do_MV, tl.trans(v_KV), input_precision=PRECISION)
        ds_MK = tl.exp2(s_MK - log_sum_M[:, None]) * (dp_MK - shared_M[:, None])
        excess_M += tl.sum(ds_MK, 1)
        dq_ME = tl.dot(ds_MK.to(k_KE.dtype), k_KE, dq_ME, input_precision=PRECISION)
    if SUMMED:
        wanted = grad_lse + b64 * wanted_b + h * wanted_h + rows
        excess_M -= tl.load(wanted, rows < num_rows, 0.0) / tl.load(unit)
    tl.store(delta + stat + rows, shared_M + excess_M)
    dq_ME *= scale * tl.load(unit)
    columns = tl.arange(0, WIDE)[None, :]
    at = grad_query + b64 * grad_b + h * grad_h + rows[:, None].to(tl.int64) * grad_t + columns
    inside = (rows < num_rows)[:, None] & (columns < E)
    tl.store(at, dq_ME.to(grad_query.dtype.element_ty), inside)


@triton.jit
def grad_key_value_kernel(
    query, key, value, grad_out, table, line, lse, delta, jacobian, sums, unit,
    grad_key, grad_value,
    num_rows, num_keys, table_size, shift, scale,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    out_b, out_h, out_t, stat_b, stat_h, line_b, gk_b, gk_h, gk_t, gv_b, gv_h, gv_t,
    KV_HEADS, GROUP, E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr,
    CAUSAL: tl.constexpr, LINED: tl.constexpr, PARAMETERS: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Store dK = unit scale dS^T Q and dV = unit P^T dO of a key head; grid (keys Hkv, B).

    For a bias of one or two PARAMETERS, also store the sums of dS times each derivative of the
    bias, `[B, tiles of keys, PARAMETERS, H]`.
    """
    follow(CHAINED)
    kv, tile = (tl.program_id(0) % KV_HEADS).to(tl.int64), tl.program_id(0) // KV_HEADS
    first_key = tile * K
    keys = first_key + tl.arange(0, K)
    b64 = tl.program_id(1).to(tl.int64)
    line += b64 * line_b
    k_KE = load_rows(key + b64 * key_b + kv * key_h, key_t, first_key, num_keys, E, K, WIDE)
    v_KV = load_rows(
        value + b64 * value_b + kv * value_h, value_t, first_key, num_keys, V, K, WIDE_V
    )
    dk_KE = tl.zeros((K, WIDE), tl.float32)
    dv_KV = tl.zeros((K, WIDE_V), tl.float32)
    low = 0
    if CAUSAL:
        low = tl.maximum(0, first_key - shift) // M * M
    heads = KV_HEADS * GROUP
    for member in range(GROUP):
        h = kv * GROUP + member
        q_base = query + b64 * query_b + h * query_h
        do_base = grad_out + b64 * out_b + h * out_h
        entries = table + h * table_size
        slopes, others = jacobian + h * table_size, jacobian + (heads + h) * table_size
        stat = b64 * stat_b + h * stat_h
        sum_K, other_K = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
        for first_row in range(low, num_rows, M):
            q_ME = load_rows(q_base, query_t, first_row, num_rows, E, M, WIDE)
            do_MV = load_rows(do_base, out_t, first_row, num_rows, V, M, WIDE_V)
            rows = first_row + tl.arange(0, M)
            log_sum_M, shared_M = tl.load(lse + stat + rows), tl.load(delta + stat + rows)
            distance = first_row + shift - first_key
            s_KM = logits(
                k_KE, q_ME, entries, table_size, distance, line, keys[:, None], scale * LOG2E,
                K, M, True, CAUSAL, LINED, PRECISION,
            )  # fmt: skip
            dp_KM = tl.dot(v_KV, tl.trans(do_MV), input_precision=PRECISION)
            p_KM = tl.exp2(s_KM - log_sum_M[None, :])
            ds_KM = p_KM * (dp_KM - shared_M[None, :])
            if PARAMETERS == 1:
                slope_KM = toeplitz(slopes, table_size, distance, 1.0, K, M, True, False)
                sum_K += tl.sum(ds_KM * slope_KM, 1)
            if PARAMETERS == 2:
                slope_KM, further_KM = toeplitz_pair(
                    slopes, others, table_size, distance, K, M, True
                )
                sum_K += tl.sum(ds_KM * slope_KM, 1)
                other_K += tl.sum(ds_KM * further_KM, 1)
            dv_KV = tl.dot(p_KM.to(do_MV.dtype), do_MV, dv_KV, input_precision=PRECISION)
            dk_KE = tl.dot(ds_KM.to(q_ME.dtype), q_ME, dk_KE, input_precision=PRECISION)
        tiles = tl.num_programs(0) // KV_HEADS
        at = sums + ((b64 * tiles + tile) * PARAMETERS) * heads + h
        if PARAMETERS > 0:
            tl.store(at, tl.sum(sum_K, 0))
        if PARAMETERS > 1:
            tl.store(at + heads, tl.sum(other_K, 0))
    factor = tl.load(unit)
    columns, columns_v = tl.arange(0, WIDE)[None, :], tl.arange(0, WIDE_V)[None, :]
    at = grad_key + b64 * gk_b + kv * gk_h + keys[:, None].to(tl.int64) * gk_t + columns
    inside = (keys < num_keys)[:, None]
    dk_KE *= scale * factor
    tl.store(at, dk_KE.to(grad_key.dtype.element_ty), inside & (columns < E))
    at = grad_value + b64 * gv_b + kv * gv_h + keys[:, None].to(tl.int64) * gv_t + columns_v
    tl.store(at, (dv_KV * factor).to(grad_value.dtype.element_ty), inside & (columns_v < V))


@triton.jit
def grad_table_kernel(
    query, key, value, grad_out, table, line, lse, delta, sums,
    num_rows, num_keys, table_size, first_diagonal, band_tile, offset, scale, batch,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    out_b, out_h, out_t, stat_b, stat_h, line_b,
    HEADS, GROUP, E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr,
    CAUSAL: tl.constexpr, LINED: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum dS of a head over the tiles of a diagonal and the batch; grid (diagonals H).

    The long diagonals of all heads come first. Rows are stored in reverse.
    """
    follow(CHAINED)
    h, slot = (tl.program_id(0) % HEADS).to(tl.int64), tl.program_id(0) // HEADS
    q = slot + first_diagonal
    positions = tl.arange(0, M)
    # All tiles of a diagonal have equal distances, so table entries are loaded once.
    entries = table + h * table_size
    c_MM = toeplitz(entries, table_size, q * M + offset, LOG2E, M, M, False, CAUSAL)
    ds_MM = tl.zeros((M, M), tl.float32)
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys, M, M)
    query += h * query_h
    key += (h // GROUP) * key_h
    value += (h // GROUP) * value_h
    grad_out += h * out_h
    lse += h * stat_h
    delta += h * stat_h
    for _element in range(batch):
        for tile in range(first, last):
            first_key = start + tile * M
            rows = tile * M + positions
            q_ME = load_rows(query, query_t, tile * M, num_rows, E, M, WIDE)
            k_ME = load_rows(key, key_t, first_key, num_keys, E, M, WIDE)
            do_MV = load_rows(grad_out, out_t, tile * M, num_rows, V, M, WIDE_V)
            v_MV = load_rows(value, value_t, first_key, num_keys, V, M, WIDE_V)
            s_MM = tl.dot(q_ME, tl.trans(k_ME), input_precision=PRECISION) * (scale * LOG2E) + c_MM
            if LINED:
                keys = first_key + positions
                s_MM += tl.load(line + keys, keys >= 0, float("-inf"))[None, :]
            log_sum_M, shared_M = tl.load(lse + rows), tl.load(delta + rows)
            dp_MM = tl.dot(do_MV, tl.trans(v_MV), input_precision=PRECISION)
            ds_MM += tl.exp2(s_MM - log_sum_M[:, None]) * (dp_MM - shared_M[:, None])
        query += query_b
        key += key_b
        value += value_b
        grad_out += out_b
        lse += stat_b
        delta += stat_b
        line += line_b
    cells = positions[:, None] * M + (M - 1 - positions)[None, :]
    slots = tl.num_programs(0) // HEADS
    tl.store(sums + (h * slots + slot) * M * M + cells, ds_MM)
