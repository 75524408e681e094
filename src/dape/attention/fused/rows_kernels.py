"""Triton kernels that prepare rows for a backward pass in fp16; `tiles` has the legend."""

import triton
import triton.language as tl

from dape.attention.fused.tiles import LOG2E, follow, load_rows


@triton.jit
def largest_kernel(
    x, y, found, num_rows, heads, tiles, x_b, x_h, x_t,
    V: tl.constexpr, WIDE_V: tl.constexpr, SUMMED: tl.constexpr, M: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Store the largest |x| of some tiles of X, and of `y` by row if SUMMED; grid (parts)."""
    follow(CHAINED)
    largest_MV = tl.zeros((M, WIDE_V), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        across = tl.cdiv(num_rows, M)
        head, first_row = tile // across, tile % across * M
        at = (head // heads).to(tl.int64) * x_b + (head % heads).to(tl.int64) * x_h
        x_MV = load_rows(x + at, x_t, first_row, num_rows, V, M, WIDE_V).to(tl.float32)
        largest_MV = tl.maximum(largest_MV, tl.abs(x_MV))
        if SUMMED:
            line = first_row + tl.arange(0, M)
            y_M = tl.load(y + head.to(tl.int64) * num_rows + line, line < num_rows, 0.0)
            largest_MV = tl.maximum(largest_MV, tl.abs(y_M)[:, None])
    tl.store(found + tl.program_id(0), tl.max(tl.max(largest_MV, 1), 0))


@triton.jit
def power_above(x):
    """Return the least power of two above or equal to a number, by the bits of the exponent."""
    bits = tl.maximum(x, 1.1754943508222875e-38).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def store_half(
    x, half, num_rows, heads, x_b, x_h, x_t, half_b, half_h, half_t,
    E: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Store some rows of X in fp16, at most the largest number that bf16 and fp16 hold."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    first_row = tl.program_id(0) * M
    rows, columns = first_row + tl.arange(0, M)[:, None], tl.arange(0, WIDE)[None, :]
    values_ME = load_rows(x + b * x_b + h * x_h, x_t, first_row, num_rows, E, M, WIDE)
    values_ME = tl.clamp(values_ME.to(tl.float32), -65280.0, 65280.0).to(tl.float16)
    at = half + b * half_b + h * half_h + rows.to(tl.int64) * half_t + columns
    tl.store(at, values_ME, (rows < num_rows) & (columns < E))


@triton.jit
def half_kernel(
    query, key, value, half_query, half_key, half_value, num_rows, num_keys, BATCH, HEADS, KV_HEADS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    hq_b, hq_h, hq_t, hk_b, hk_h, hk_t, hv_b, hv_h, hv_t,
    E: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, WIDE_V: tl.constexpr, M: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Store Q, K and, if asked, V in fp16; grid (rows, B H, 2 or 3), of rows and heads the most."""
    follow(CHAINED)
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
    out, rest, grad_out, lse, grad_lse, largest, unit, scaled, copied, delta, num_rows,
    out_b, out_h, out_t, grad_b, grad_h, grad_t, lse_b, lse_h,
    scaled_b, scaled_h, scaled_t, copied_b, copied_h, copied_t, delta_b, delta_h,
    HEADS, V: tl.constexpr, WIDE_V: tl.constexpr, RESTED: tl.constexpr, PADDED: tl.constexpr,
    SUMMED: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Store the unit, dO / unit, and delta = (O . dO - g) / unit by row; grid (rows, B H).

    g is the gradient of the log-sum-exp, if SUMMED: dS = P (dP - delta). The log-sum-exp is copied,
    and if PADDED in base 2, with rows past the last, as `Rows` says. The unit is made of the
    largest numbers of so many PARTS, and 1 without.
    """
    follow(CHAINED)
    b, h = tl.program_id(1) // HEADS, (tl.program_id(1) % HEADS).to(tl.int64)
    scale = 1.0
    if PARTS > 0:
        scale = power_above(tl.max(tl.load(largest + tl.arange(0, PARTS)), 0))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(unit, scale)
    first_row = tl.program_id(0) * M
    line, b64 = first_row + tl.arange(0, M), b.to(tl.int64)
    at = b64 * out_b + h * out_h
    o_MV = load_rows(out + at, out_t, first_row, num_rows, V, M, WIDE_V).to(tl.float32)
    if RESTED:
        o_MV += load_rows(rest + at, out_t, first_row, num_rows, V, M, WIDE_V)
    do_MV = load_rows(
        grad_out + b64 * grad_b + h * grad_h, grad_t, first_row, num_rows, V, M, WIDE_V
    )
    do_MV = do_MV.to(tl.float32) / scale
    columns = tl.arange(0, WIDE_V)[None, :]
    at = scaled + b64 * scaled_b + h * scaled_h + line[:, None].to(tl.int64) * scaled_t + columns
    inside = (line < num_rows)[:, None] & (columns < V)
    tl.store(at, do_MV.to(scaled.dtype.element_ty), inside)
    products_M = tl.sum(o_MV * do_MV, 1)
    if SUMMED:
        wanted_M = tl.load(grad_lse + b64 * lse_b + h * lse_h + line, line < num_rows, 0.0)
        products_M -= wanted_M / scale
    stored = line < num_rows
    log_sum_M = tl.load(lse + b64 * lse_b + h * lse_h + line, stored, float("inf"))
    if PADDED:
        log_sum_M = tl.where(log_sum_M == float("-inf"), 0.0, log_sum_M) * LOG2E
        stored = line >= 0
    tl.store(delta + b64 * delta_b + h * delta_h + line, products_M, stored)
    at = b64 * copied_b + h * copied_h + line.to(tl.int64) * copied_t
    tl.store(copied + at, log_sum_M, stored)
