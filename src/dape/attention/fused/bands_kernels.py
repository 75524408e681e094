"""Triton kernels of a head that pass over the scores of a band; mixers compute across heads.

    scores           X = scale Q K^T, Y = dO V^T - delta    tiles of rows and keys
    softmax_value    O = softmax(X + C) V           rows against a span of keys
    balance          Y and dO in float32            rows

In the scratch `[B, rows, blocks of keys, H, BLOCK]` all heads of a few keys are neighbours. A tile
across heads is contiguous, and a kernel of a head still reads whole sectors. `tiles` has the
legend.
"""

import triton
import triton.language as tl

from dape.attention.fused.tiles import (
    BLOCK,
    LOG2E,
    beyond,
    follow,
    head_and_rows,
    load_rows,
    sees,
    store_output,
    tile_at,
    toeplitz,
    turns,
    unwanted,
)


@triton.jit
def places(rows, first_key, row_size, heads, K: tl.constexpr):
    """Return the places of K keys of a head in the scratch, from a multiple of K on."""
    keys = tl.arange(0, K)[None, :]
    if K < BLOCK:
        keys += first_key
        columns = keys // BLOCK * (BLOCK * heads) + keys % BLOCK
    else:
        columns = first_key * heads + keys // BLOCK * (BLOCK * heads) + keys % BLOCK
    return rows.to(tl.int64) * row_size + columns


@triton.jit
def store_products(
    left, right, x, scale, delta, gate, first_row, low, high, heads, num_rows, num_keys,
    left_t, right_t, x_t,
    E: tl.constexpr, WIDE: tl.constexpr, LESS: tl.constexpr, LIMIT: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store X = scale left right^T for some rows and keys; set `gate` for a score above LIMIT.

    If LESS, delta is taken off each row.
    """
    rows = first_row + tl.arange(0, M)
    a_ME = load_rows(left, left_t, first_row, num_rows, E, M, WIDE)
    if LESS:
        delta_M = tl.load(delta + rows, rows < num_rows, 0.0)
    largest_M = tl.zeros((M,), tl.float32)
    for first_key in range(low, high, K):
        b_KE = load_rows(right, right_t, first_key, num_keys, E, K, WIDE)
        s_MK = tl.dot(a_ME, tl.trans(b_KE), input_precision=PRECISION) * scale
        if LIMIT is not None:
            largest_M = tl.maximum(largest_M, tl.max(tl.abs(s_MK), 1))
        if LESS:
            s_MK -= delta_M[:, None]
        if x.dtype.element_ty == tl.float16:
            s_MK = tl.clamp(s_MK, -65504.0, 65504.0)
        keys = first_key + tl.arange(0, K)[None, :]
        inside = (rows < num_rows)[:, None] & (keys < tl.cdiv(num_keys, BLOCK) * BLOCK)
        at = x + places(rows[:, None], first_key, x_t, heads, K)
        tl.store(at, s_MK.to(x.dtype.element_ty), inside)
    if LIMIT is not None:
        tl.store(gate, 1, tl.max(largest_M, 0) > LIMIT)


@triton.jit
def scores_kernel(
    query, key, x, grad_out, value, y, scale, unit, delta,
    num_rows, num_keys, shift, keys_per_split,
    query_b, query_h, query_t, key_b, key_h, key_t, x_b, x_t,
    out_b, out_h, out_t, value_b, value_h, value_t, delta_b, delta_h,
    HEADS, GROUP, E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr,
    CAUSAL: tl.constexpr, BOTH: tl.constexpr, LIMIT: tl.constexpr,
    gate, GATED: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """X = scale Q K^T, and if BOTH Y = dO V^T / unit - delta, of rows against a span of keys.

    The grid is (rows H, B, spans), or (rows H, B, 2 spans) for BOTH. delta is subtracted before Y
    is rounded: where a row has one key alone, dP is delta, and nothing is left. A score above a
    LIMIT sets `gate`.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    b = tl.program_id(1).to(tl.int64)
    span = tl.program_id(2)
    if BOTH:
        span //= 2
    for turn in range(turns(tl.cdiv(num_rows, M) * HEADS, GATED)):
        h, first_row = head_and_rows(tile_at(turn), num_rows, HEADS, M)
        at, kv = b * x_b + h * BLOCK, h // GROUP
        low = span * keys_per_split
        high = tl.minimum(num_keys, low + keys_per_split)
        if CAUSAL:
            high = tl.minimum(high, first_row + M + shift)
        if not BOTH or tl.program_id(2) % 2 == 0:
            store_products(
                query + b * query_b + h * query_h, key + b * key_b + kv * key_h, x + at,
                scale, delta, gate, first_row, low, high, HEADS, num_rows, num_keys,
                query_t, key_t, x_t, E, WIDE, False, LIMIT, M, K, PRECISION,
            )  # fmt: skip
        else:
            store_products(
                grad_out + b * out_b + h * out_h, value + b * value_b + kv * value_h, y + at,
                1.0 / tl.load(unit), delta + b * delta_b + h * delta_h, gate,
                first_row, low, high, HEADS, num_rows, num_keys,
                out_t, value_t, x_t, V, WIDE_V, True, None, M, K, PRECISION,
            )  # fmt: skip


@triton.jit
def with_first_keys(c_MK, tables, indices_M, keys, table_size, heads):
    """Return C of a tile with the entries of keys 0 and 1, from the two tables after the first."""
    first = tables + heads * table_size.to(tl.int64)
    second = first + heads * table_size.to(tl.int64)
    inside = (indices_M >= 0) & (indices_M < table_size)
    first_M = tl.load(first + indices_M, inside, 0.0)
    second_M = tl.load(second + indices_M - 1, inside & (indices_M > 0), 0.0)
    c_MK = tl.where(keys == 0, first_M[:, None], c_MK)
    return tl.where(keys == 1, second_M[:, None], c_MK)


@triton.jit
def add_keys(
    top_M, total_M, acc_MV, head_x, head_values, head_table, first_row, first_key,
    num_rows, num_keys, shift, table_size, x_t, value_t,
    HEADS, V: tl.constexpr, WIDE_V: tl.constexpr, CAUSAL: tl.constexpr, TABLES: tl.constexpr,
    EXACT: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the largest logit, the sum of exponentials, and the sum of values with K more keys.

    TABLES of C are added to X: none, one, or three, of which the last two are for keys 0 and 1.
    """
    rows, keys = first_row + tl.arange(0, M)[:, None], first_key + tl.arange(0, K)[None, :]
    inside = (rows < num_rows) & (keys < tl.cdiv(num_keys, BLOCK) * BLOCK)
    s_MK = tl.load(head_x + places(rows, first_key, x_t, HEADS, K), inside, 0.0).to(tl.float32)
    if TABLES > 0:
        distance = first_row + shift - first_key
        c_MK = toeplitz(head_table, table_size, distance, 1.0, M, K, False, False)
        if TABLES > 1:
            indices_M = first_row + shift + tl.arange(0, M)
            c_MK = with_first_keys(c_MK, head_table, indices_M, keys, table_size, HEADS)
        s_MK += c_MK
    s_MK = tl.where(sees(rows, keys, num_rows, num_keys, shift, CAUSAL), s_MK, float("-inf"))
    new_top_M = tl.maximum(top_M, tl.max(s_MK, 1))
    safe_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
    p_MK = tl.exp2((s_MK - safe_M[:, None]) * LOG2E)
    shrink_M = tl.exp2((top_M - safe_M) * LOG2E)
    total_M = total_M * shrink_M + tl.sum(p_MK, 1)
    v_KV = load_rows(head_values, value_t, first_key, num_keys, V, K, WIDE_V)
    rounded_MK = p_MK.to(v_KV.dtype)
    acc_MV = tl.dot(rounded_MK, v_KV, acc_MV * shrink_M[:, None], input_precision=PRECISION)
    if EXACT:
        left_MK = (p_MK - rounded_MK.to(tl.float32)).to(v_KV.dtype)
        acc_MV = tl.dot(left_MK, v_KV, acc_MV, input_precision=PRECISION)
    return new_top_M, total_M, acc_MV


@triton.jit
def softmax_value_kernel(
    x, value, table, out, lse, rest, num_rows, num_keys, shift, keys_per_split,
    table_size, x_b, x_t, value_b, value_h, value_t,
    out_s, out_b, out_h, out_t, lse_s, lse_b, lse_h,
    HEADS, GROUP, V: tl.constexpr, WIDE_V: tl.constexpr, CAUSAL: tl.constexpr,
    TABLES: tl.constexpr, EXACT: tl.constexpr, RESTED: tl.constexpr,
    gate, LIMIT: tl.constexpr, GATED: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """O = softmax(X) V of a head, rows against a span of keys; grid (rows H, B, spans).

    TABLES of C are added to X: none, one, or three, of which the last two are for keys 0 and 1. If
    EXACT, the rounding error of P meets V too. A log-sum-exp beyond a LIMIT sets `gate`.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    b64 = tl.program_id(1).to(tl.int64)
    for turn in range(turns(tl.cdiv(num_rows, M) * HEADS, GATED)):
        h, first_row = head_and_rows(tile_at(turn), num_rows, HEADS, M)
        head_x = x + b64 * x_b + h * BLOCK
        head_values = value + b64 * value_b + (h // GROUP) * value_h
        head_table = table + h * table_size
        rows = first_row + tl.arange(0, M)[:, None]
        top_M = tl.full((M,), float("-inf"), tl.float32)
        total_M = tl.zeros((M,), tl.float32)
        acc_MV = tl.zeros((M, WIDE_V), tl.float32)
        low = tl.program_id(2) * keys_per_split
        high = tl.minimum(num_keys, low + keys_per_split)
        if CAUSAL:
            high = tl.minimum(high, first_row + M + shift)
        if TABLES > 1:  # a tile of its own, since a branch in the loop would stop the loads ahead
            top_M, total_M, acc_MV = add_keys(
                top_M, total_M, acc_MV, head_x, head_values, head_table, first_row, low,
                num_rows, num_keys, shift, table_size, x_t, value_t, HEADS, V, WIDE_V,
                CAUSAL, TABLES, EXACT, M, K, PRECISION,
            )  # fmt: skip
            low += K
        for first_key in range(low, high, K):
            top_M, total_M, acc_MV = add_keys(
                top_M, total_M, acc_MV, head_x, head_values, head_table, first_row, first_key,
                num_rows, num_keys, shift, table_size, x_t, value_t, HEADS, V, WIDE_V,
                CAUSAL, min(TABLES, 1), EXACT, M, K, PRECISION,
            )  # fmt: skip
        acc_MV /= tl.where(total_M > 0, total_M, 1.0)[:, None]
        columns = tl.arange(0, WIDE_V)[None, :]
        at = (
            tl.program_id(2).to(tl.int64) * out_s
            + b64 * out_b
            + h * out_h
            + rows.to(tl.int64) * out_t
            + columns
        )
        store_output(out, rest, at, acc_MV, (rows < num_rows) & (columns < V), RESTED)
        line = first_row + tl.arange(0, M)
        at = tl.program_id(2) * lse_s + b64 * lse_b + h * lse_h + line
        log_sum_M = top_M + tl.log(
            tl.where(total_M > 0, total_M, 1.0)
        )  # top is -inf where nothing is seen
        tl.store(lse + at, log_sum_M, line < num_rows)
        if LIMIT is not None:
            tl.store(gate, 1, tl.max(beyond(log_sum_M, LIMIT), 0) > 0)


@triton.jit
def balance_kernel(
    x, y, table, lse, scaled, grad_lse, unit,
    num_rows, num_keys, shift, table_size,
    x_b, x_t, stat_b, stat_h, stat_t, out_b, out_h, out_t, grad_b, grad_h,
    HEADS, V: tl.constexpr, WIDE_V: tl.constexpr,
    CAUSAL: tl.constexpr, TABLED: tl.constexpr, SUMMED: tl.constexpr,
    gate, GATED: tl.constexpr, M: tl.constexpr, K: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Give rows of P the sum 1, and rows of dS = P Y exact sums; grid (rows H, B).

    A row of dS sums to the gradient of the log-sum-exp of the row, zero unless SUMMED. For large
    logits X, rounded logits and a rounded log-sum-exp give `mix_backward` another P than the
    forward pass had, and the error of a row of dS meets tables as large as the logits. Therefore
    the kernel takes the mean off Y, and divides the factors of P, Y and dO, by the sum of P.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    b64 = tl.program_id(1).to(tl.int64)
    for turn in range(turns(tl.cdiv(num_rows, M) * HEADS, GATED)):
        h, first_row = head_and_rows(tile_at(turn), num_rows, HEADS, M)
        head_x, head_y = x + b64 * x_b + h * BLOCK, y + b64 * x_b + h * BLOCK
        head_table, head_scaled = table + h * table_size, scaled + b64 * out_b + h * out_h
        line = first_row + tl.arange(0, M)
        rows = line[:, None]
        stat = b64 * stat_b + h * stat_h + line.to(tl.int64) * stat_t
        log_sum_M = tl.load(lse + stat, line < num_rows, 0.0)
        log_sum_M = tl.where(log_sum_M == float("-inf"), 0.0, log_sum_M)
        total_M, excess_M = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
        high = num_keys
        if CAUSAL:
            high = tl.minimum(high, first_row + M + shift)
        for first_key in range(0, high, K):
            keys = first_key + tl.arange(0, K)[None, :]
            inside = sees(rows, keys, num_rows, num_keys, shift, CAUSAL)
            at = places(rows, first_key, x_t, HEADS, K)
            s_MK = tl.load(head_x + at, inside, float("-inf")).to(tl.float32)
            if TABLED:
                distance = first_row + shift - first_key
                s_MK += toeplitz(head_table, table_size, distance, 1.0, M, K, False, False)
            p_MK = tl.exp2((s_MK - log_sum_M[:, None]) * LOG2E)
            y_MK = tl.load(head_y + at, inside & (p_MK > 0), 0.0)
            total_M += tl.sum(p_MK, 1)
            excess_M += tl.sum(p_MK * y_MK, 1)
        part_M = 1 / tl.where(total_M > 0, total_M, 1.0)
        excess_M *= part_M
        if SUMMED:
            wanted_M = tl.load(grad_lse + b64 * grad_b + h * grad_h + line, line < num_rows, 0.0)
            excess_M -= wanted_M / tl.load(unit)
        for first_key in range(0, high, K):
            keys = first_key + tl.arange(0, K)[None, :]
            inside = sees(rows, keys, num_rows, num_keys, shift, CAUSAL)
            at = head_y + places(rows, first_key, x_t, HEADS, K)
            y_MK = tl.load(at, inside, 0.0) - excess_M[:, None]
            tl.store(at, y_MK * part_M[:, None], inside)
        do_MV = load_rows(head_scaled, out_t, first_row, num_rows, V, M, WIDE_V) * part_M[:, None]
        columns = tl.arange(0, WIDE_V)[None, :]
        at = head_scaled + rows.to(tl.int64) * out_t + columns
        tl.store(at, do_MV.to(scaled.dtype.element_ty), (rows < num_rows) & (columns < V))
