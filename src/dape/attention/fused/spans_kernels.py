"""Triton kernel that merges spans of keys; `tiles` has the legend."""

import triton
import triton.language as tl

from dape.attention.fused.tiles import beyond, follow, store_output, unwanted


@triton.jit
def combine_kernel(
    part, part_lse, out, lse, rest, num_rows, part_s, part_r, lse_s,
    out_b, out_h, out_t, lse_b, lse_h,
    HEADS, V: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr, SPANS: tl.constexpr,
    RESTED: tl.constexpr, gate, LIMIT: tl.constexpr, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """O of rows from the outputs of all spans, weighted by softmax mass.

    The grid is (tiles of M rows, B H, parts of V). A log-sum-exp beyond a LIMIT sets `gate`.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    rows, spans = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, SPANS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    there_M, there_V = rows < num_rows, columns < V
    row_M = (tl.program_id(1) * num_rows + rows).to(tl.int64)
    # Parts are asked for first, and arrive while weights are computed.
    at = spans[None, :, None].to(tl.int64) * part_s + row_M[:, None, None] * part_r
    inside = there_M[:, None, None] & there_V[None, None, :]
    parts_MSV = tl.load(part + at + columns[None, None, :], inside, 0.0)
    at = spans[None, :] * lse_s + row_M[:, None]
    mass_MS = tl.load(part_lse + at, there_M[:, None], float("-inf"))
    top_M = tl.max(mass_MS, 1)
    weight_MS = tl.exp(mass_MS - tl.where(top_M == float("-inf"), 0.0, top_M)[:, None])
    total_M = tl.sum(weight_MS, 1)
    total_M = tl.where(total_M > 0, total_M, 1.0)
    o_MV = tl.sum(parts_MSV * weight_MS[:, :, None], 1) / total_M[:, None]
    at = b * out_b + h * out_h + rows[:, None].to(tl.int64) * out_t + columns[None, :]
    store_output(out, rest, at, o_MV, there_M[:, None] & there_V[None, :], RESTED)
    log_sum_M = top_M + tl.log(total_M)
    tl.store(lse + b * lse_b + h * lse_h + rows, log_sum_M, there_M & (tl.program_id(2) == 0))
    if LIMIT is not None:
        tl.store(gate, 1, tl.max(beyond(log_sum_M, LIMIT), 0) > 0)
