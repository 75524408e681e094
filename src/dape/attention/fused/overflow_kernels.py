"""Triton kernels that test whether numbers leave the range of 16 bits; `tiles` has the legend."""

import triton
import triton.language as tl

from dape.attention.fused.tiles import follow


@triton.jit
def weights_kernel(
    gate,
    w1,
    w2,
    limit,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    UNITS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Set `gate` to 1 if |W1| or |W2| |W1| may take scores of 1 beyond `limit`, else to 0."""
    follow(CHAINED)
    heads, units = tl.arange(0, HEADS), tl.arange(0, UNITS)
    inside = (units[:, None] < D) & (heads[None, :] < H)
    w1_DH = tl.load(w1 + units[:, None] * H + heads[None, :], inside, 0.0)
    w2_DH = tl.load(w2 + heads[None, :] * D + units[:, None], inside, 0.0)
    hidden = tl.sum(tl.abs(w1_DH), 1)
    most = tl.maximum(tl.max(hidden, 0), tl.max(tl.sum(tl.abs(w2_DH) * hidden[:, None], 0), 0))
    tl.store(gate, (most > limit).to(tl.int32))


@triton.jit
def range_kernel(
    gate,
    first,
    second,
    first_size,
    second_size,
    LIMIT: tl.constexpr,
    N: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Set `gate` if a number of two tables is beyond a limit; grid (entries)."""
    follow(CHAINED)
    n = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.maximum(
        tl.abs(tl.load(first + n, n < first_size, 0.0)),
        tl.abs(tl.load(second + n, n < second_size, 0.0)),
    )
    tl.store(gate, 1, tl.max(x, 0) > LIMIT)


@triton.jit
def feature_range_kernel(
    gate, hidden, static, weight, bias, LIMIT: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FEATURES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Set `gate` if FIRE's features may make a number beyond a limit of U `[1 + F, D]` or C.

    A feature relu(v x + c) of an x in [0, 1] is no larger than max(c, v + c, 0); the first is 1.
    """
    follow(CHAINED)
    f, heads, units = tl.arange(0, FEATURES), tl.arange(0, HEADS), tl.arange(0, UNITS)
    inside = (f > 0) & (f <= F)
    v = tl.load(weight + f - 1, inside, 0.0)
    c = tl.load(bias + f - 1, inside, 0.0)
    most_F = tl.where(f == 0, 1.0, tl.maximum(tl.maximum(c, v + c), 0.0))
    live = (f <= F)[:, None]
    u_FD = tl.load(hidden + f[:, None] * D + units[None, :], live & (units < D)[None, :], 0.0)
    at = static + heads[None, :] * (F + 1) + f[:, None]
    c_FH = tl.load(at, live & (heads < H)[None, :], 0.0)
    of_units = tl.max(tl.sum(tl.abs(u_FD) * most_F[:, None], 0), 0)
    of_heads = tl.max(tl.sum(tl.abs(c_FH) * most_F[:, None], 0), 0)
    tl.store(gate, 1, tl.maximum(of_units, of_heads) > LIMIT)
