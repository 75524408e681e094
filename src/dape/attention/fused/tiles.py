"""Functions of several kernels on a tile, in Triton, and the legend of all kernels.

A suffix names the axes of a variable, a letter for an axis:

    M rows    K keys    N positions, M x K of them, row by row    S spans of keys
    H heads   D hidden units   F features of FIRE   T taps of DAPE V2
    E head_dim of queries and keys   V head_dim of values
    L lines, the diagonals of a tile   C columns or channels   A, B any

`u_ND` is `[N, D]`. Sizes in capitals are fixed when a kernel is compiled. HEADS, UNITS, FEATURES,
TAPS, WIDE and WIDE_V are H, D, F, T, E and V with padding. Strides of span, batch, head and row end
with `_s, _b, _h, _t`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
# Keys of a head that are neighbours in the scratch.
BLOCK = tl.constexpr(64)


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Wait for the results of the kernel before, if this one may start while that one runs."""
    if CHAINED:
        gdc_wait()


@triton.jit
def unwanted(gate, GATED: tl.constexpr):
    """Return whether a kernel must not run: whether `gate` differs from a GATED of 0 or 1."""
    if GATED < 0:
        return False
    return tl.load(gate) != GATED


@triton.jit
def turns(tiles, GATED: tl.constexpr):
    """Return how many tiles this program computes: one, or in the wide way every so many-th.

    The wide way has few programs, since most calls stop all of them. The compiler drops a loop of
    one turn.
    """
    if GATED == 1:
        return tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))
    return 1


@triton.jit
def tile_at(turn):
    """Return the tile of a turn of this program."""
    return tl.program_id(0) + turn * tl.num_programs(0)


@triton.jit
def head_and_rows(tile, num_rows, HEADS, M: tl.constexpr):
    """Return the head and the first row of a tile.

    The tiles of all heads come in turn, the longest first. With a head after the other, the long
    tiles of the last head would start late, and most of the GPU would wait for them.
    """
    return (tile % HEADS).to(tl.int64), (tl.cdiv(num_rows, M) - 1 - tile // HEADS) * M


@triton.jit
def load_rows(base, stride, start, count, E: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Load `[ROWS, WIDE]` of a `[count, E]` matrix with contiguous rows, zeros outside."""
    rows, columns = start + tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = (rows[:, None] >= 0) & (rows[:, None] < count) & (columns[None, :] < E)
    return tl.load(base + rows[:, None].to(tl.int64) * stride + columns[None, :], inside, 0.0)


@triton.jit
def sees(rows, keys, num_rows, num_keys, shift, CAUSAL: tl.constexpr):
    """Return whether `rows` see `keys`; `shift` is the index of the first row."""
    last = num_keys - 1
    if CAUSAL:
        last = tl.minimum(last, rows + shift)
    return keys <= tl.where(rows < num_rows, last, -1)


@triton.jit
def toeplitz(
    table, size, distance, factor,
    A: tl.constexpr, B: tl.constexpr, KEYS_FIRST: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return the entries of a table, times `factor`, of a tile `[rows, keys]`, or KEYS_FIRST.

    The table is over the distance |i - j| < `size`, and `distance` is i - j of the first row and
    key. If CAUSAL, later keys have -inf. A `size` of 0 stands for no table.
    The entries of the diagonals are loaded once. A gather spreads the entries in the layout of the
    product of queries and keys, since a load for every element would cost more than the product.
    """
    DIAGONALS: tl.constexpr = 2 * (A if A > B else B)
    LAST: tl.constexpr = (A if KEYS_FIRST else B) - 1
    d = distance - LAST + tl.arange(0, DIAGONALS)
    entries = tl.load(table + tl.abs(d), tl.abs(d) < size, 0.0) * factor
    if CAUSAL:
        entries = tl.where(d < 0, float("-inf"), entries)
    return spread(entries, A, B, KEYS_FIRST)


@triton.jit
def spread(entries, A: tl.constexpr, B: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Return the entries of the diagonals of a tile, in order of i - j, at every pair."""
    n = tl.arange(0, A * B)
    if KEYS_FIRST:
        return tl.reshape(tl.gather(entries, n % B - n // B + A - 1, 0), (A, B))
    return tl.reshape(tl.gather(entries, n // B - n % B + B - 1, 0), (A, B))


@triton.jit
def toeplitz_pair(
    first, second, size, distance, A: tl.constexpr, B: tl.constexpr, KEYS_FIRST: tl.constexpr
):
    """Return two tables of a tile, as `toeplitz` does, by a single gather of eight bytes."""
    DIAGONALS: tl.constexpr = 2 * (A if A > B else B)
    d = tl.abs(distance - (A if KEYS_FIRST else B) + 1 + tl.arange(0, DIAGONALS))
    low = tl.load(first + d, d < size, 0.0).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(second + d, d < size, 0.0).to(tl.uint32, bitcast=True).to(tl.uint64)
    both_AB = spread(low | (high << 32), A, B, KEYS_FIRST)
    low_AB = (both_AB & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    return low_AB, (both_AB >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def diagonal_tiles(q, band_tile, num_rows, num_keys, M: tl.constexpr, K: tl.constexpr):
    """Return the row tiles of this program on diagonal q, and the key where row tile 0 starts.

    Tile t of diagonal q holds rows t M + m and keys start + t M + n: i - j is equal for all t.
    A program of axis 2 takes a segment.
    """
    start = (band_tile - q) * K
    first = tl.cdiv(tl.maximum(0, 1 - start - K), M)
    last = tl.cdiv(tl.minimum(num_rows, tl.maximum(0, num_keys - start)), M)
    share = tl.cdiv(tl.maximum(0, last - first), tl.num_programs(2))
    first += tl.program_id(2) * share
    return first, tl.minimum(last, first + share), start


@triton.jit
def beyond(log_sum, LIMIT: tl.constexpr):
    """Return 1 where a log-sum-exp is beyond a limit, and 0 for rows without a visible key."""
    return ((tl.abs(log_sum) > LIMIT) & (log_sum != float("-inf"))).to(tl.int32)


@triton.jit
def store_output(out, rest, at, o, inside, RESTED: tl.constexpr):
    """Store O in the dtype of `out`, and if RESTED the rounding error in the dtype of `rest`."""
    rounded = o.to(out.dtype.element_ty)
    tl.store(out + at, rounded, inside)
    if RESTED:
        tl.store(rest + at, (o - rounded.to(tl.float32)).to(rest.dtype.element_ty), inside)
