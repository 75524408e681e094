"""Functions of several kernels on the heads of a tile's positions, in Triton.

`tiles` has the legend.
"""

import triton
import triton.language as tl

from dape.attention.fused.tiles import BLOCK


@triton.jit
def load_hidden(hidden, delta, units, size, D: tl.constexpr):
    """Return U `[N, D]` at the distances of a tile's positions."""
    distance = tl.abs(delta)[:, None]
    inside = (distance < size) & (units[None, :] < D)
    return tl.load(hidden + distance * D + units[None, :], inside, 0.0)


@triton.jit
def load_static(static, delta, heads, size, H: tl.constexpr):
    """Return C `[N, H]` at the distances of a tile's positions."""
    distance = tl.abs(delta)[:, None]
    inside = (distance < size) & (heads[None, :] < H)
    return tl.load(static + heads[None, :] * size + distance, inside, 0.0)


@triton.jit
def load_weights(w1, w2, heads, units, H: tl.constexpr, D: tl.constexpr):
    """Return W1^T `[H, D]` and W2 `[H, D]`."""
    inside = (heads[:, None] < H) & (units[None, :] < D)
    w1_HD = tl.load(w1 + units[None, :] * H + heads[:, None], inside, 0.0)
    return w1_HD, tl.load(w2 + heads[:, None] * D + units[None, :], inside, 0.0)


@triton.jit
def load_feature_tables(
    hidden, static, heads, units, places,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Return U `[F, D]` and C `[F, H]` of the features, and `[D]` and `[H]` of the constant 1."""
    u_row, c_row = hidden + units, static + heads * (F + 1)
    u_D = tl.load(u_row, units < D, 0.0)
    c_H = tl.load(c_row, heads < H, 0.0)
    inside = places[:, None] < F
    u_FD = tl.load(u_row[None, :] + (places[:, None] + 1) * D, inside & (units < D)[None, :], 0.0)
    c_FH = tl.load(c_row[None, :] + (places[:, None] + 1), inside & (heads < H)[None, :], 0.0)
    return u_FD, c_FH, u_D, c_H


@triton.jit
def in_parts(x, dtype: tl.constexpr):
    """Return a float32 matrix in two parts of a dtype, the second what rounding left of it."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def add_dot(a, high, low, acc, PRECISION: tl.constexpr):
    """Return a (high + low) + acc; of a float32 matrix nothing is left for `low`.

    A hidden unit near zero has the gradient of its sign. The rounding of a layer would turn the
    units of all keys alike, and those of the scores, which are random, add up to less.
    """
    acc = tl.dot(a, high, acc, input_precision=PRECISION)
    if a.dtype != tl.float32:
        acc = tl.dot(a, low, acc, input_precision=PRECISION)
    return acc


@triton.jit
def rise(w_ND, u_ND):
    """Return phi(w + u) - phi(u), exact however large u is.

    For relu(w + u) - relu(u) = max(w, -u) + min(u, 0), at either sign of u.
    """
    return 0.01 * w_ND + 0.99 * (tl.maximum(w_ND, -u_ND) + tl.minimum(u_ND, 0.0))


@triton.jit
def lies(rows, keys, num_rows, num_keys):
    """Return whether positions lie in the scratch.

    Keys of the scratch end with a block, so a vector of keys lies inside or outside as a whole.
    """
    return (rows < num_rows) & (keys >= 0) & (keys < tl.cdiv(num_keys, BLOCK) * BLOCK)


@triton.jit
def tile_positions(
    tile, start, n, delta_ij, num_rows, num_keys, mask,
    M: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return rows and keys of a tile's positions, inside the scratch or not, visible or not."""
    rows, keys = tile * M + n // K, start + tile * M + n % K
    there = lies(rows, keys, num_rows, num_keys)
    seen = there & (keys < num_keys)
    if MASKED:
        seen &= tl.load(mask + keys, seen, 0) != 0
    if CAUSAL:
        seen &= delta_ij >= 0
    return rows, keys, there, seen


@triton.jit
def places_of_heads(rows, keys, heads, row_size, H: tl.constexpr):
    """Return the places of all heads of a tile's positions `[N]` in the scratch, `[N, HEADS]`."""
    at = rows.to(tl.int64) * row_size + keys // BLOCK * (BLOCK * H) + keys % BLOCK
    return at[:, None] + heads[None, :] * BLOCK


@triton.jit
def add_or_store(at, share, ADD: tl.constexpr):
    """Store a share, or add a share to the stored numbers."""
    if ADD:
        share += tl.load(at)
    tl.store(at, share)
