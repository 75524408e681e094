"""Triton kernel that mixes heads by convolutions along the keys, for few rows.

`tiles` has the legend. A program makes the hidden units of its keys at all taps anew, from the
scores of the keys around. No other program has to be waited for, and hidden units need no scratch.
Weights are `[T D, H]` and `[H, T D]`. U is over the distance of the key that a tap meets.
"""

import triton
import triton.language as tl

from dape.attention.fused.across_heads import lies, load_static, places_of_heads
from dape.attention.fused.mixers.taps_kernels import sees
from dape.attention.fused.tiles import follow


@triton.jit
def load_scores(x, row, keys, seen, heads, row_size, H: tl.constexpr):
    """Return the scores of keys of a row `[K, HEADS]`, 0 where unseen."""
    at = x + places_of_heads(row, keys, heads, row_size, H)
    return tl.load(at, seen[:, None] & (heads[None, :] < H), 0.0).to(tl.float32)


@triton.jit
def hidden_units(
    x, w1, hidden_table, b1_D, columns, row, started, num_rows, num_keys, shift, table_size, mask,
    row_size, heads, units, H: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return phi(b1 + sum_t W1_t X + U_t) of columns of a row `[K, UNITS]`, 0 before `started`."""
    z_KD = b1_D[None, :] + tl.zeros((columns.shape[0], b1_D.shape[0]), tl.float32)
    for tap in tl.static_range(T):
        keys = columns + tap - T // 2
        seen = sees(row, keys, num_rows, num_keys, shift, mask, CAUSAL, MASKED)
        distances = tl.abs(row + shift - keys)
        at = hidden_table + distances[:, None].to(tl.int64) * (T * D) + tap * D + units[None, :]
        inside = (seen & (distances < table_size))[:, None] & (units[None, :] < D)
        z_KD += tl.load(at, inside, 0.0)
        at = (tap * D + units[None, :]) * H + heads[:, None]
        w1_HD = tl.load(w1 + at, (heads[:, None] < H) & (units[None, :] < D), 0.0)
        x_KH = load_scores(x, row, keys, seen, heads, row_size, H)
        z_KD = tl.dot(x_KH, w1_HD, z_KD, input_precision=PRECISION)
    z_KD = tl.where(z_KD > 0, z_KD, 0.01 * z_KD)
    return tl.where((columns >= started)[:, None], z_KD, 0.0)


@triton.jit
def rows_mix_kernel(
    x, logits, w1, w2, hidden_table, bias, static_table, mask, started, counted, counted_end, flag,
    num_rows, num_keys, shift, table_size, x_b, x_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, FLAGS: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Logits X + sum_t W2_t Z + C of a row, -inf if unseen; grid (tiles of K keys, rows, B).

    Keys from `counted` to its end have a weight. If FLAGS, `flag` becomes 1.
    """
    follow(CHAINED)
    if FLAGS:
        tl.store(flag, 1)
    row, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys = tl.program_id(0) * K + tl.arange(0, K)
    heads, units = tl.arange(0, HEADS), tl.arange(0, UNITS)
    x += b * x_b
    mask += b * mask_b
    start_key = tl.load(started + b) if MASKED else 0
    seen = sees(row, keys, num_rows, num_keys, shift, mask, CAUSAL, MASKED)
    b1_D = tl.load(bias + units, units < D, 0.0)
    s_KH = load_scores(x, row, keys, seen, heads, x_t, H)
    s_KH += load_static(static_table, row + shift - keys, heads, table_size, H)
    for tap in tl.static_range(T):
        z_KD = hidden_units(
            x, w1, hidden_table, b1_D, keys + tap - T // 2, row, start_key,
            num_rows, num_keys, shift, table_size, mask, x_t, heads, units, H, D, T,
            CAUSAL, MASKED, PRECISION,
        )  # fmt: skip
        at = heads[None, :] * (T * D) + tap * D + units[:, None]
        w2_DH = tl.load(w2 + at, (heads[None, :] < H) & (units[:, None] < D), 0.0)
        s_KH = tl.dot(z_KD, w2_DH, s_KH, input_precision=PRECISION)
    seen &= (keys >= counted) & (keys < counted_end)
    s_KH = tl.where(seen[:, None], s_KH, float("-inf"))
    at = logits + b * x_b + places_of_heads(row, keys, heads, x_t, H)
    there = lies(row, keys, num_rows, num_keys)
    tl.store(at, s_KH, there[:, None] & (heads[None, :] < H))
