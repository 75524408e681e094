"""Attention in bands of query rows: the kernels put together, forward and backward.

For tables U, C over the distance and weights W1, W2, the logits of a query and a key are
`A + C + W2 phi(W1 A + U)` with `A = scale q k^T`; without weights they are `A + C`. Only the output
and the log-sum-exp of each row are kept for the backward pass. Everything is a fixed sequence of
kernels without atomics, so that two passes agree bit for bit.
"""

from math import isqrt, prod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad
from triton import cdiv, next_power_of_2

from dape.attention.fused import kernels

# Scores that stand in the scratch at a time, two bytes each (four in float32).
SCORES_PER_BAND = 2**27
# Bands start, and rows of the scratch are padded, at multiples of this: whole tiles of every mixer.
ALIGNMENT = 32
# Programs that keep a large GPU busy; few rows are split over spans of keys to have as many.
PROGRAMS = 256


class Tile(NamedTuple):
    """Rows and keys of a program of one head, its warps, and the loads it has under way."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# The fastest of a few on an H100 at head_dim 64, by `benchmarks/tiles.py`.
TILES = {
    "scores": Tile(64, 128, 4, 2),
    "softmax_value": Tile(64, 64, 4, 4),
    "grad_query": Tile(64, 64, 4, 4),
    "grad_key_value": Tile(64, 64, 4, 3),
}
# Products of float32 are taken in float32, not TF32.
PRECISION = "ieee"


class Mixing(NamedTuple):
    """What mixes heads: C `[H, N]` and U `[N, D]` over the distances, W1 `[D, H]`, W2 `[H, D]`."""

    static: Float[Tensor, "heads distances"]
    hidden: Float[Tensor, "distances hidden"]
    weight_in: Float[Tensor, "hidden heads"]
    weight_out: Float[Tensor, "heads hidden"]


class Features(NamedTuple):
    """FIRE's `f = (1, relu(weight x + bias))`, for `x = psi[|i - j|] scale[max(i, j)]`.

    The tables of the `Mixing` beside them are over these features: C `[H, 1 + F]`, U `[1 + F, D]`.
    """

    psi: Float[Tensor, "distances"]
    scale: Float[Tensor, "slots"]
    weight: Float[Tensor, "features"]
    bias: Float[Tensor, "features"]


class Problem(NamedTuple):
    """One call: the arguments every kernel needs, checked and in their final layout.

    Without `mixing`, `static` is C `[H, N]` over the distances 0..N-1, if there is a bias. `mask`
    is true for keys that may be seen. `features` are FIRE's.
    """

    query: Float[Tensor, "batch heads rows head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    static: Float[Tensor, "heads distances"] | None
    mixing: Mixing | None
    mask: Bool[Tensor, "batch keys"] | None
    scale: float
    causal: bool
    offset: int
    features: Features | None = None

    def part(self, batch: slice) -> "Problem":
        """Return the problem of some elements of the batch."""
        return self._replace(
            query=self.query[batch],
            key=self.key[batch],
            value=self.value[batch],
            mask=None if self.mask is None else self.mask[batch],
        )


class Band(NamedTuple):
    """Some rows of some elements of the batch, the keys they see and the slot of the first row."""

    batch: slice
    rows: slice
    keys: int
    shift: int


def bands(problem: Problem) -> list[Band]:
    """Return the bands of a problem: the whole, unless a scratch limits their size.

    Rows that see fewer keys come in higher bands, so that all are about as large.
    """
    batch, heads, rows, _ = problem.query.shape
    found, start, group = [], 0, batch
    while start < rows:
        height = rows - start
        if problem.mixing is not None:
            room = SCORES_PER_BAND // heads
            height = min(height, highest(problem, start, room))
            if start == 0:
                area = height * cdiv(visible(problem, height), ALIGNMENT) * ALIGNMENT
                group = max(1, min(batch, room // area))
        found.append((slice(start, start + height), visible(problem, start + height)))
        start += height
    return [
        Band(slice(first, min(batch, first + group)), band, keys, problem.offset + band.start)
        for first in range(0, batch, group)
        for band, keys in found
    ]


def visible(problem: Problem, rows: int) -> int:
    """Return how many keys the first `rows` queries see among them, at least one."""
    keys = problem.key.shape[2]
    return min(keys, max(1, problem.offset + rows)) if problem.causal else keys


def highest(problem: Problem, start: int, room: int) -> int:
    """Return how many rows from `start` on fit a scratch of so many scores a head."""
    keys = problem.key.shape[2]
    height = room // (cdiv(keys, ALIGNMENT) * ALIGNMENT)
    if problem.causal:
        # Of h rows the last sees c + h keys, and the scratch is padded to less than c + h + 32.
        c = max(0, problem.offset + start) + ALIGNMENT
        height = max(height, (isqrt(c * c + 4 * room) - c) // 2)
    return max(ALIGNMENT, height // ALIGNMENT * ALIGNMENT)


class Scratch(NamedTuple):
    """A buffer for the scores of one band at a time."""

    buffer: Tensor
    heads: int

    @classmethod
    def of(cls, problem: Problem) -> "Scratch":
        """Return a buffer for the largest band of a problem."""
        heads = problem.query.shape[1]
        dtype = torch.float32 if problem.query.dtype == torch.float32 else torch.float16
        size = max(prod(cls.shape(band, heads)) for band in bands(problem))
        return cls(problem.query.new_empty(size, dtype=dtype), heads)

    @staticmethod
    def shape(band: Band, heads: int) -> tuple[int, int, int, int]:
        """Return the size of a band's scores; keys are padded to an aligned stride."""
        keys = cdiv(band.keys, ALIGNMENT) * ALIGNMENT
        return band.batch.stop - band.batch.start, heads, band.rows.stop - band.rows.start, keys

    def view(self, band: Band) -> Float[Tensor, "group heads rows keys"]:
        """Return the scores of a band."""
        shape = self.shape(band, self.heads)
        return self.buffer[: prod(shape)].view(shape)


@runtime_checkable
class Mixer(Protocol):
    """The two kernels across heads, in Triton or CUDA, and the tiles they take along a diagonal.

    `Slots` is where the second sums the gradients of the tables, along the `lines` of a tile.
    """

    Slots: type[Any]
    tile_rows: int
    tile_keys: int
    lines: int

    def segments(self, diagonals: int, rows: int) -> int:
        """Return into how many segments to cut each of so many diagonals, a program each."""

    def whole(
        self, problem: Problem, mixing: Mixing, exact: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return what `forward` does by one kernel, or None where there is none for a problem."""

    def mix(self, x: Tensor, band: Band, problem: Problem, mixing: Mixing) -> None:
        """Turn the scores X of a band into logits, in place; -inf where unseen."""

    def mix_backward(
        self,
        x: Tensor,
        y: Tensor,
        band: Band,
        problem: Problem,
        mixing: Mixing,
        lse: Tensor,
        delta: Tensor,
        slots: Any,
    ) -> None:
        """Turn scores X and dP in Y of a band into P and dA, in place; add to the slots."""


class Diagonals(NamedTuple):
    """The diagonals of tiles of a band: q holds distances q K + offset + m - n, m < M, n < K.

    `first` is that of the whole problem, so that a diagonal keeps its slot in every band.
    """

    first: int
    number: int
    band_tile: int
    offset: int


def diagonals(problem: Problem, band: Band, tile_rows: int, tile_keys: int) -> Diagonals:
    """Return the diagonals of a band for tiles of M rows and K keys, M dividing K."""
    offset = problem.offset % tile_keys
    if problem.causal:
        first = -((offset + tile_rows - 1) // tile_keys)
    else:
        first = problem.offset // tile_keys + 1 - cdiv(problem.key.shape[2], tile_keys)
    band_tile = band.shift // tile_keys
    last_row = (cdiv(band.rows.stop - band.rows.start, tile_rows) - 1) * tile_rows
    last = band_tile + (last_row + tile_keys - 1) // tile_keys
    return Diagonals(first, max(0, last + 1 - first), band_tile, offset)


def switches(problem: Problem) -> dict[str, Any]:
    """Return the compile-time arguments that the kernels of one head share."""
    return {
        "GROUP": problem.query.shape[1] // problem.key.shape[1],
        "CAUSAL": problem.causal,
        "PRECISION": PRECISION,
    }


def wide(size: int) -> int:
    """Return a head dimension as products take it."""
    return max(16, next_power_of_2(size))


def tile_of(kernel: str, problem: Problem, rows: int) -> Tile:
    """Return the tile of a kernel: small ones for few rows, and where four bytes fill memory.

    What wide heads have under way fits the 99 KiB of shared memory of smaller GPUs.
    """
    tile = TILES[kernel]
    if max(problem.query.shape[3], problem.value.shape[3]) > 64:
        tile = tile._replace(num_stages=tile.num_stages - 1)
    if problem.query.element_size() == 4:
        tile = Tile(min(tile.rows, 32), min(tile.keys, 32), 4, 2)
    if rows <= 16 and kernel in ("scores", "softmax_value"):
        tile = tile._replace(rows=16)
    return tile


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of batch, head and row; the last axis is contiguous."""
    return tensor.stride()[:3]


def scores(
    left: Tensor, right: Tensor, out: Tensor, band: Band, problem: Problem, scale: float
) -> None:
    """Fill `out` with `scale left right^T` of a band."""
    batch, heads, rows, size = left.shape
    tile = tile_of("scores", problem, rows)
    grid = (cdiv(band.keys, tile.keys), cdiv(rows, tile.rows), batch * heads)
    kernels.scores_kernel[grid](
        left, right, out, scale, rows, band.keys, band.shift,
        *strides(left), *strides(right), *strides(out),
        heads, heads // right.shape[1], E=size, WIDE=wide(size),
        CAUSAL=problem.causal, M=tile.rows, K=tile.keys, PRECISION=PRECISION,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def key_spans(problem: Problem, band: Band, tile: Tile) -> tuple[int, int]:
    """Return over how many spans the keys of a band are split, a power of two, and their length."""
    rows = cdiv(band.rows.stop - band.rows.start, tile.rows)
    programs = rows * (band.batch.stop - band.batch.start) * problem.query.shape[1]
    wanted = max(1, min(PROGRAMS // programs, band.keys // 256, 64))
    spans = 1 << (wanted.bit_length() - 1)
    return spans, cdiv(cdiv(band.keys, spans), tile.keys) * tile.keys


def softmax_value(
    x: Tensor, band: Band, problem: Problem, out: Tensor, lse: Tensor, rest: Tensor
) -> None:
    """Fill what `forward` returns of a band, over spans of keys where rows alone are too few."""
    part = problem.part(band.batch)
    batch, heads, rows, value_dim = out.shape
    tile = tile_of("softmax_value", problem, rows)
    spans, length = key_spans(problem, band, tile)
    parts, parts_lse, rested = out[None], lse[None], spans == 1 and rest.numel() > 0
    if spans > 1:
        parts = out.new_empty(spans, *out.shape, dtype=torch.float32)
        parts_lse = lse.new_empty(spans, *lse.shape)
    kernels.softmax_value_kernel[(cdiv(rows, tile.rows), batch * heads, spans)](
        x, part.value, parts, parts_lse, rest, rows, band.keys, band.shift, length,
        *strides(x), *strides(part.value), *parts.stride()[:4], *parts_lse.stride()[:3],
        heads, **switches(problem), V=value_dim, WIDE_V=wide(value_dim), RESTED=rested,
        M=tile.rows, K=tile.keys, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if spans > 1:
        combine(parts, parts_lse, out, lse, rest)


def combine(parts: Tensor, parts_lse: Tensor, out: Tensor, lse: Tensor, rest: Tensor) -> None:
    """Fill what `forward` returns from the parts of the spans of keys, on the first axis."""
    batch, heads, rows, value_dim = out.shape
    kernels.combine_kernel[(rows, batch * heads)](
        parts, parts_lse, out, lse, rest, rows, parts.stride(0), value_dim, parts_lse.stride(0),
        *strides(out), *lse.stride()[:2],
        heads, V=value_dim, WIDE_V=next_power_of_2(value_dim), SPANS=len(parts),
        RESTED=rest.numel() > 0, num_warps=4,
    )  # fmt: skip


def forward(problem: Problem, mixer: Mixer, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output `[B, H, Tq, dv]`, the log-sum-exp `[B, H, Tq]`, and what rounding left.

    A query that sees no key has zeros and -inf. The backward pass takes dO O by row from all of dS;
    an error there is the same for every key and grows in the sums of tables and weights, so that,
    if `exact`, what rounding took from the output is kept beside it, else an empty tensor.
    """
    from dape.attention.fused import decode, static

    if problem.mixing is None:
        return *static.forward(problem), problem.query.new_empty(0)
    if decode.serves(problem):
        return decode.forward(problem, problem.mixing, exact)
    whole = mixer.whole(problem, problem.mixing, exact)
    if whole is not None:
        return whole
    out, lse, rest = outputs(problem, exact)
    scratch = Scratch.of(problem)
    for band in bands(problem):
        at, x, part = (
            (band.batch, slice(None), band.rows),
            scratch.view(band),
            problem.part(band.batch),
        )
        scores(part.query[:, :, band.rows], part.key, x, band, problem, problem.scale)
        mixer.mix(x, band, problem, problem.mixing)
        softmax_value(x, band, problem, out[at], lse[at], rest[at] if rest.numel() else rest)
    return out, lse, rest


def outputs(problem: Problem, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for what `forward` returns; float32 leaves nothing to keep."""
    query = problem.query
    out = query.new_empty(*query.shape[:3], problem.value.shape[3])
    lse = query.new_empty(out.shape[:3], dtype=torch.float32)
    kept = exact and query.dtype != torch.float32
    return out, lse, torch.empty_like(out) if kept else query.new_empty(0)


def backward(
    problem: Problem, mixer: Mixer, out: Tensor, lse: Tensor, rest: Tensor, grad_out: Tensor
) -> list[Tensor]:
    """Return the gradients of q, k, v and of the tables in their order, the scores band by band.

    Two-byte types compute in fp16, which has more digits than bf16: `grad_out` is brought to order
    one by a power of two, `unit`, by which the gradients are multiplied in the end, exactly.
    """
    dtype = problem.query.dtype
    unit = torch.ones((), device=out.device)
    if dtype != torch.float32:
        largest = torch.linalg.vector_norm(grad_out, float("inf")).float()
        unit = torch.exp2(torch.log2(largest.clamp(min=torch.finfo(torch.float32).tiny)).ceil())
        query, key, value = map(to_half, (problem.query, problem.key, problem.value))
        problem = problem._replace(query=query, key=key, value=value)
    grad_out, delta = prepared(problem, out, rest, grad_out, unit)
    whole = all(band.rows.stop - band.rows.start == out.shape[2] for band in bands(problem))
    grad_query = torch.empty_like(problem.query, dtype=dtype)
    if whole:
        grad_key, grad_value = (
            torch.empty_like(x, dtype=dtype) for x in (problem.key, problem.value)
        )
    else:
        grad_key, grad_value = (
            torch.zeros_like(x, dtype=torch.float32) for x in (problem.key, problem.value)
        )
    sums = Sums(grad_query, grad_key, grad_value, unit, not whole)
    tables = table_gradients(problem, mixer, lse, delta, grad_out, sums)
    return [
        grad_query, grad_key.to(dtype), grad_value.to(dtype), *(table * unit for table in tables)
    ]  # fmt: skip


def to_half(x: Tensor) -> Tensor:
    """Return `x` in fp16, with what bf16 holds beyond its range brought to the border."""
    if x.dtype == torch.float16:
        return x
    half = torch.empty_like(x, dtype=torch.float16)
    batch, heads, rows, size = x.shape
    kernels.half_kernel[(cdiv(rows, 64), batch * heads)](
        x, half, rows, *strides(x), *strides(half),
        heads, E=size, WIDE=wide(size), M=64, num_warps=4,
    )  # fmt: skip
    return half


def prepared(
    problem: Problem, out: Tensor, rest: Tensor, grad_out: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dO / unit in the dtype of the problem, and its products with O by row."""
    batch, heads, rows, value_dim = out.shape
    scaled = torch.empty_like(out, dtype=problem.query.dtype)
    delta = out.new_empty(batch, heads, rows, dtype=torch.float32)
    kernels.row_products_kernel[(cdiv(rows, 64), batch * heads)](
        out, rest, grad_out, unit, scaled, delta, rows,
        *strides(out), *strides(grad_out), *strides(scaled), *delta.stride()[:2],
        heads, V=value_dim, WIDE_V=next_power_of_2(value_dim), RESTED=rest.numel() > 0,
        M=64, num_warps=4,
    )  # fmt: skip
    return scaled, delta


class Sums(NamedTuple):
    """Where dQ, dK and dV go, times `unit`; `add` if several bands add to dK and dV."""

    query: Tensor
    key: Tensor
    value: Tensor
    unit: Tensor
    add: bool


def table_gradients(
    problem: Problem, mixer: Mixer, lse: Tensor, delta: Tensor, grad_out: Tensor, sums: Sums
) -> list[Tensor]:
    """Fill dQ, dK and dV, and return the gradients of the tables and weights."""
    from dape.attention.fused import static

    mixing = problem.mixing
    if mixing is None:
        return static.backward(problem, lse, delta, grad_out, sums)
    scratch, other, slots = (
        Scratch.of(problem), Scratch.of(problem), mixer.Slots.of(problem, mixing, mixer)
    )  # fmt: skip
    for band in bands(problem):
        at, part = (band.batch, slice(None), band.rows), problem.part(band.batch)
        x, y = scratch.view(band), other.view(band)
        scores(part.query[:, :, band.rows], part.key, x, band, problem, problem.scale)
        scores(grad_out[at], part.value, y, band, problem, 1.0)
        mixer.mix_backward(x, y, band, problem, mixing, lse[at], delta[at], slots)
        one_head(x, y, band, problem, grad_out[at], sums)
    return slots.gradients(problem, mixing, mixer)


class Slots(NamedTuple):
    """Where each segment of each diagonal of each element of a group sums its gradients."""

    weight_in: Float[Tensor, "group segments slots UNITS HEADS"]
    weight_out: Float[Tensor, "group segments slots HEADS UNITS"]
    hidden: Float[Tensor, "group segments slots lines UNITS"]
    static: Float[Tensor, "group segments slots lines HEADS"]

    @classmethod
    def of(cls, problem: Problem, mixing: Mixing, mixer: Mixer) -> "Slots":
        """Return zeros for the bands of a problem."""
        group, count = slots_of(problem, mixer)
        units, heads = padded(mixing)
        rows = max(band.rows.stop - band.rows.start for band in bands(problem))
        segments = mixer.segments(group * count, rows)

        def zeros(*size: int) -> Tensor:
            return problem.query.new_zeros(group, segments, count, *size, dtype=torch.float32)

        return cls(
            zeros(units, heads),
            zeros(heads, units),
            zeros(mixer.lines, units),
            zeros(mixer.lines, heads),
        )

    def gradients(self, problem: Problem, mixing: Mixing, mixer: Mixer) -> list[Tensor]:
        """Return the gradients of C, U, W1 and W2."""
        count, units = mixing.hidden.shape
        heads, tile_keys = problem.query.shape[1], mixer.tile_keys
        where = diagonals(problem, bands(problem)[0], mixer.tile_rows, tile_keys)
        static = from_diagonals(self.static.sum((0, 1)), where, tile_keys, count)[:, :heads]
        hidden = from_diagonals(self.hidden.sum((0, 1)), where, tile_keys, count)[:, :units]
        weight_in = self.weight_in.sum((0, 1, 2))[:units, :heads]
        weight_out = self.weight_out.sum((0, 1, 2))[:heads, :units]
        tables = (static.t(), hidden, weight_in, weight_out)
        return [table.contiguous() for table in tables]


def slots_of(problem: Problem, mixer: Mixer) -> tuple[int, int]:
    """Return the elements of a group, and how many diagonals each may have in a band."""
    all_bands = bands(problem)
    numbers = (diagonals(problem, x, mixer.tile_rows, mixer.tile_keys).number for x in all_bands)
    return all_bands[0].batch.stop, max(numbers)


def padded(mixing: Mixing) -> tuple[int, int]:
    """Return hidden units and heads as the mixers pad them."""
    units, heads = mixing.weight_in.shape
    return max(16, next_power_of_2(units)), max(16, next_power_of_2(heads))


def from_diagonals(
    lines: Float[Tensor, "slots lines columns"], where: Diagonals, tile_keys: int, count: int
) -> Float[Tensor, "distances columns"]:
    """Return sums for the distances 0..count-1 from those of the lines of each diagonal.

    Line r of diagonal q is i - j = q K + offset + r - (K - 1): the lines of neighbouring diagonals
    overlap, and negative ones fold onto positive ones, since |i - j| is what counts.
    """
    slots, reach, columns = lines.shape
    total = lines.new_zeros(slots + 1, tile_keys, columns)
    total[:-1] += lines[:, :tile_keys]
    total[1:, : reach - tile_keys] += lines[:, tile_keys:]
    total = total.flatten(0, 1)
    zero = (tile_keys - 1) - where.first * tile_keys - where.offset  # the row of i - j = 0
    total, zero = pad(total, (0, 0, max(0, -zero), 0)), max(0, zero)
    right = total[zero : zero + count]
    table = pad(right, (0, 0, 0, count - right.shape[0]))
    left = total[max(0, zero - count + 1) : zero].flip(0)
    table[1 : 1 + left.shape[0]] += left
    return table


def one_head(
    x: Tensor, y: Tensor, band: Band, problem: Problem, grad_out: Tensor, sums: Sums
) -> None:
    """Fill dQ of a band, and dK and dV, from P and dA."""
    part = problem.part(band.batch)
    query, grad_query = part.query[:, :, band.rows], sums.query[band.batch, :, band.rows]
    grad_key, grad_value = sums.key[band.batch], sums.value[band.batch]
    batch, heads, rows, head_dim = query.shape
    value_dim, place = grad_out.shape[3], (band.shift, problem.scale)
    shape = {**switches(problem), "E": head_dim, "WIDE": wide(head_dim)}
    tile = tile_of("grad_query", problem, rows)
    kernels.grad_query_kernel[(cdiv(rows, tile.rows), batch * heads)](
        y, part.key, sums.unit, grad_query, rows, band.keys, *place,
        *strides(y), *strides(part.key), *strides(grad_query),
        heads, **shape, M=tile.rows, K=tile.keys,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    # Without a band to come, keys that no row sees have their zeros from this one.
    keys = band.keys if sums.add else part.key.shape[2]
    kv_heads, tile = part.key.shape[1], tile_of("grad_key_value", problem, rows)
    kernels.grad_key_value_kernel[(cdiv(keys, tile.keys), batch * kv_heads)](
        x, y, query, grad_out, sums.unit, grad_key, grad_value,
        keys, rows, band.keys, *place,
        *strides(x), *strides(query), *strides(grad_out),
        *strides(grad_key), *strides(grad_value),
        kv_heads, **shape, V=value_dim, WIDE_V=wide(value_dim), M=tile.rows, K=tile.keys,
        ADD=sums.add, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
