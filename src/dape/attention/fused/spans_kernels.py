"""Triton kernel that merges spans of keys; `tiles` has the legend."""

import triton
import triton.language as tl

from dape.attention.fused.tiles import beyond, follow, store_output, unwanted


@triton.jit
def combine_kernel(
    part, part_lse, out, lse, rest, num_rows, part_s, part_r, lse_s,
    out_b, out_h, out_t, lse_b, lse_h,
    HEADS, V: tl.constexpr, COLUMNS: tl.constexpr, SPANS: tl.constexpr, RESTED: tl.constexpr,
    gate, LIMIT: tl.constexpr, GATED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """O of a row from the outputs of all spans, weighted by softmax mass.

    The grid is (rows, B H, parts of V). A log-sum-exp beyond a LIMIT sets `gate`.
    """
    follow(CHAINED)
    if unwanted(gate, GATED):
        return
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    row = tl.program_id(1) * num_rows + tl.program_id(0)
    spans, columns = tl.arange(0, SPANS), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    # Parts are asked for first, and arrive while weights are computed.
    at = spans[:, None].to(tl.int64) * part_s + row.to(tl.int64) * part_r + columns[None, :]
    parts_SV = tl.load(part + at, (columns < V)[None, :], 0.0)
    mass_S = tl.load(part_lse + spans * lse_s + row)
    top = tl.max(mass_S, 0)
    weight_S = tl.exp(mass_S - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight_S, 0)
    o_V = tl.sum(parts_SV * weight_S[:, None], 0) / tl.where(total > 0, total, 1.0)
    at = b * out_b + h * out_h + tl.program_id(0).to(tl.int64) * out_t + columns
    store_output(out, rest, at, o_V, columns < V, RESTED)
    log_sum = top + tl.log(tl.where(total > 0, total, 1.0))
    tl.store(lse + b * lse_b + h * lse_h + tl.program_id(0), log_sum, tl.program_id(2) == 0)
    if LIMIT is not None:
        tl.store(gate, 1, beyond(log_sum, LIMIT) > 0)
