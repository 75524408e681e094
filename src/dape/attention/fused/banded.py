"""Attention in bands of scores: the kernels put together, forward and backward.

For tables U, C over the distance and weights W1, W2, the logits of a query and a key are
`A + C + W2 (phi(W1 A + U) - phi(U))` with `A = scale q k^T`; without weights they are `A + C`. Only
the output and the log-sum-exp of each row are kept for the backward pass. Everything is a fixed
sequence of kernels without atomics, so that two passes agree bit for bit.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused import geometry, kernels
from dape.attention.fused.geometry import (
    Band,
    Gate,
    Mixing,
    Problem,
    Scratch,
    bands,
    blocks,
    cdiv,
    next_power_of_2,
    strides,
)

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


@runtime_checkable
class Mixer(Protocol):
    """The kernels across heads, in Triton or CUDA.

    `Slots` is where the second sums the gradients of the tables.
    """

    Slots: type[Any]

    def whole(
        self,
        problem: Problem,
        mixing: Mixing,
        out: Tensor,
        lse: Tensor,
        rest: Tensor,
        flag: Tensor,
    ) -> bool:
        """Fill what `forward` returns by one kernel; return whether there is one for a problem."""

    def walk(self, problem: Problem, mixing: Mixing) -> Any:
        """Return the backward pass as one kernel, where there is one for a problem, or None."""

    def mix(self, x: Tensor, band: Band, problem: Problem, mixing: Mixing) -> None:
        """Turn the scores X of a band into logits, in place; -inf where unseen.

        Logits are without C where it is a table over the distance: where a problem is `tabled`.
        """

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
    ) -> tuple[Tensor, Tensor]:
        """Return P and dA of a band in place of scores X and dP in Y; add to the slots."""


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


# Tiles of scores for a program that may have nothing to do.
TILES_PER_PROGRAM = 16


def tile_of(kernel: str, problem: Problem, rows: int) -> Tile:
    """Return the tile of a kernel: small ones for few rows, and where four bytes fill memory.

    What wide heads have under way fits the 99 KiB of shared memory of smaller GPUs.
    """
    tile = TILES[kernel]
    if max(problem.query.shape[3], problem.value.shape[3]) > 64:
        tile = tile._replace(num_stages=tile.num_stages - 1)
    if problem.scratch == torch.float32:
        tile = Tile(min(tile.rows, 32), min(tile.keys, 32), 4, 2)
    if rows <= 16 and kernel in ("scores", "softmax_value"):
        tile = tile._replace(rows=16)
    return tile


def scores(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    band: Band,
    problem: Problem,
    scale: float,
    unit: Tensor | None = None,
    flag: Tensor | None = None,
) -> None:
    """Fill `out` with `scale left right^T` of a band, divided by `unit` if given.

    A score that is too large for 16 bits sets the `flag`, if given.
    """
    batch, heads, rows, size = left.shape
    tile, asks = tile_of("scores", problem, rows), asking(problem, flag)
    keys, span = right.shape[2], TILES_PER_PROGRAM if asks["GATED"] == 1 else 1
    if flag is not None:
        asks["LIMIT"] = geometry.LARGEST_SCORE
    tiles = cdiv(keys, tile.keys) * cdiv(rows, tile.rows)
    kernels.scores_kernel[(cdiv(tiles, span) * heads, batch)](
        left, right, out, scale, left if unit is None else unit, rows, keys, band.shift,
        *strides(left), *strides(right), *out.stride()[:2],
        heads, heads // right.shape[1], E=size, WIDE=wide(size),
        CAUSAL=problem.causal, IN_UNITS=unit is not None, SPAN=span, **asks,
        M=tile.rows, K=tile.keys,
        PRECISION=PRECISION, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def key_spans(problem: Problem, band: Band, tile: Tile) -> tuple[int, int]:
    """Return over how many spans the keys of a band are split, a power of two, and their length."""
    batch, rows, keys = band.sizes
    programs = cdiv(rows, tile.rows) * batch * problem.query.shape[1]
    wanted = max(1, min(PROGRAMS // programs, keys // 256, 64))
    spans = 1 << (wanted.bit_length() - 1)
    return spans, cdiv(cdiv(keys, spans), tile.keys) * tile.keys


def softmax_value(
    x: Tensor,
    value: Tensor,
    table: Tensor | None,
    band: Band,
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    flag: Tensor | None,
) -> None:
    """Fill what `forward` returns of a band, over spans of keys where rows alone are too few.

    `table` is C if the logits are without. A log-sum-exp that is too large for 16 bits sets the
    `flag`, if given.
    """
    batch, heads, rows, value_dim = out.shape
    tile = tile_of("softmax_value", problem, rows)
    spans, length = key_spans(problem, band, tile)
    parts, parts_lse, exact, asks = out[None], lse[None], rest.numel() > 0, asking(problem, flag)
    if spans > 1:
        parts = out.new_empty(spans, *out.shape, dtype=torch.float32)
        parts_lse = lse.new_empty(spans, *lse.shape)
    entries = lse if table is None else table
    kernels.softmax_value_kernel[(cdiv(rows, tile.rows), batch * heads, spans)](
        x, value, entries, parts, parts_lse, rest, rows, value.shape[2], band.shift, length,
        entries.shape[1], *x.stride()[:2], *strides(value),
        *parts.stride()[:4], *parts_lse.stride()[:3],
        heads, **switches(problem), V=value_dim, WIDE_V=wide(value_dim),
        TABLED=table is not None, EXACT=exact, RESTED=exact and spans == 1,
        **asks if spans == 1 else asking(problem, None),
        M=tile.rows, K=tile.keys, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if spans > 1:
        combine(parts, parts_lse, asks, out, lse, rest)


def asking(problem: Problem, flag: Tensor | None) -> dict[str, Any]:
    """Return the arguments of a kernel that sets the `flag`, if given, or may not be wanted."""
    if flag is None:
        return {**problem.gated(), "LIMIT": None}
    return {"gate": flag, "GATED": -1, "LIMIT": geometry.LARGEST_SUM}


def combine(
    parts: Tensor,
    parts_lse: Tensor,
    asks: dict[str, Any],
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
) -> None:
    """Fill what `forward` returns from the parts of the spans of keys, on the first axis.

    `asks` are the arguments of `asking`.
    """
    batch, heads, rows, value_dim = out.shape
    kernels.combine_kernel[(rows, batch * heads)](
        parts, parts_lse, out, lse, rest, rows, parts.stride(0), value_dim, parts_lse.stride(0),
        *strides(out), *lse.stride()[:2],
        heads, V=value_dim, WIDE_V=next_power_of_2(value_dim), SPANS=len(parts),
        RESTED=rest.numel() > 0, **asks, num_warps=4,
    )  # fmt: skip


def forward(problem: Problem, mixer: Mixer, exact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output `[B, H, Tq, dv]`, the log-sum-exp `[B, H, Tq]`, what rounding left, a flag.

    A query that sees no key has zeros and -inf. The backward pass takes dO O by row from all of dS;
    an error there is the same for every key and grows in the sums of tables and weights. So, if
    `exact`, P meets V in two parts, and what rounding took from the output is kept beside it, else
    an empty tensor. The flag is 1 where numbers leave the range of 16 bits, and all was computed in
    a wider one; it is empty where nothing stands in 16 bits.
    """
    from dape.attention.fused import decode, static

    query, mixing = problem.query, problem.mixing
    found = outputs(problem, exact)
    if mixing is None:
        static.forward(problem, *found)
        return *found, query.new_empty(0, dtype=torch.int32)
    if query.dtype == torch.float32:
        flag = query.new_empty(0, dtype=torch.int32)
        if decode.serves(problem):
            decode.forward(problem, mixing, *found)
        else:
            forward_by_bands(problem, mixing, mixer, *found)
        return *found, flag
    if decode.serves(problem):  # in the wide range, and so is the little there is on the way back
        decode.forward(problem, mixing, *found)
        return *found, query.new_ones(1, dtype=torch.int32)
    flag = out_of_range(problem, mixing)
    if not mixer.whole(problem, mixing, *found, flag):
        forward_by_bands(problem, mixing, mixer, *found, flag)
    wider = problem._replace(gate=Gate(flag, True))
    if problem.tabled:
        decode.forward(wider, mixing, *found)
    else:
        forward_by_bands(wider, mixing, mixer, *found)
    return *found, flag


def forward_by_bands(
    problem: Problem,
    mixing: Mixing,
    mixer: Mixer,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    flag: Tensor | None = None,
) -> None:
    """Fill what `forward` returns, band by band; numbers that are too large set the `flag`."""
    all_bands = bands(problem)
    scratch = Scratch.of(problem, all_bands)
    table = table_of(problem, mixing)
    for band in all_bands:
        at, x, part = (band.batch, slice(None), band.rows), scratch.view(band), problem.part(band)
        query = part.query[:, :, band.rows]
        scores(query, part.key, x, band, problem, problem.scale, flag=flag)
        mixer.mix(x, band, problem, mixing)
        kept = rest[at] if rest.numel() else rest
        softmax_value(x, part.value, table, band, problem, out[at], lse[at], kept, flag)


def table_of(problem: Problem, mixing: Mixing) -> Tensor | None:
    """Return C if logits in the scratch are without."""
    return mixing.static if problem.tabled else None


def out_of_range(problem: Problem, mixing: Mixing) -> Tensor:
    """Return a flag that is 1 if weights or tables alone leave the range of 16 bits.

    Tables over the distance stay in float32. Others, and what FIRE's features make of them, stand
    in the scratch with the logits and hidden units.
    """
    flag = mixing.static.new_empty(1, dtype=torch.int32)
    (units, heads), most = mixing.weight_in.shape, geometry.LARGEST_NUMBER / geometry.LARGEST_SCORE
    kernels.weights_kernel[(1,)](
        flag, mixing.weight_in, mixing.weight_out, most / problem.taps**2, H=heads, D=units,
        HEADS=next_power_of_2(heads), UNITS=max(1, next_power_of_2(units)), num_warps=4,
    )  # fmt: skip
    limit, hidden, static = geometry.LARGEST_SCORE, mixing.hidden, mixing.static
    if problem.features is not None:
        kernels.feature_range_kernel[(1,)](
            flag, hidden, static, problem.features.weight, problem.features.bias, limit,
            H=heads, D=units, F=len(problem.features.weight), HEADS=next_power_of_2(heads),
            UNITS=max(1, next_power_of_2(units)),
            FEATURES=next_power_of_2(1 + len(problem.features.weight)), num_warps=4,
        )  # fmt: skip
    elif not problem.tabled:
        sizes = hidden.numel(), static.numel()
        kernels.range_kernel[(cdiv(max(sizes), 2048),)](
            flag, hidden, static, *sizes, limit, N=2048, num_warps=4
        )
    return flag


def outputs(problem: Problem, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for what `forward` returns; float32 leaves nothing to keep."""
    query = problem.query
    out = query.new_empty(*query.shape[:3], problem.value.shape[3])
    lse = query.new_empty(out.shape[:3], dtype=torch.float32)
    kept = exact and query.dtype != torch.float32
    return out, lse, torch.empty_like(out) if kept else query.new_empty(0)


def backward(
    problem: Problem,
    mixer: Mixer,
    wide_mixer: Mixer,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    flag: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> list[Tensor]:
    """Return the gradients of q, k, v and of the tables in their order, the scores band by band.

    Two-byte types compute in fp16, which has more digits than bf16: `grad_out` is brought to order
    one by a power of two, `unit`, by which the gradients are multiplied in the end, exactly. It is
    no less than `grad_lse` either. Where the `flag` is 1 the scratch is in float32.
    """
    from dape.attention.fused import static

    dtype = problem.query.dtype
    if dtype == torch.float32:
        unit = lse.new_ones(())
    else:
        unit = power_above(grad_out, grad_lse)
        problem = in_half(problem)
    scaled, lse, delta = prepared(problem, out, rest, lse, grad_out, grad_lse, unit)
    given, ways = (problem.query, problem.key, problem.value), [(problem, mixer)]
    if flag.numel():
        gates = (Gate(flag, wide) for wide in (False, True))
        problems = (problem._replace(gate=gate) for gate in gates)
        ways = [*zip(problems, (mixer, wide_mixer), strict=True)]
    widest = ways[-1][0]
    whole = all(band.rows.start == band.keys.start == 0 for band in blocks(widest))
    if whole:
        query, key, value = (torch.empty_like(x, dtype=dtype) for x in given)
    else:
        query, key, value = (torch.zeros_like(x, dtype=torch.float32) for x in given)
    sums = Sums(query, key, value, unit, not whole)
    if problem.mixing is None:
        tables = static.backward(problem, lse, delta, grad_lse, scaled, sums)
    else:
        tables = [torch.empty_like(table) for table in problem.tables()]
        rows = lse, delta, grad_lse, grad_out, scaled
        for way, its in ways:  # one of them runs, and fills all
            mixed_backward(way, its, problem.mixing, *rows, sums, tables)
    return [*(gradient.to(dtype) for gradient in sums[:3]), *tables]


def power_above(*tensors: Tensor | None) -> Float[Tensor, ""]:
    """Return the least power of two that is no less than any number in some tensors."""
    norms = [
        torch.linalg.vector_norm(tensor, float("inf"), dtype=torch.float32)
        for tensor in tensors
        if tensor is not None
    ]
    unit = torch.empty_like(norms[0])
    kernels.unit_kernel[(1,)](norms[0], norms[-1], unit, num_warps=1)
    return unit


def in_half(problem: Problem) -> Problem:
    """Return a problem in fp16, where bf16 goes beyond its range at the border of both.

    V stays as it is where heads mix: it meets dO, not what stands in the scratch.
    """
    given = problem.query, problem.key, problem.value
    if problem.query.dtype == torch.float16:
        return problem
    number = 3 if problem.mixing is None else 2
    query, key, value = halves = [torch.empty_like(x, dtype=torch.float16) for x in given]
    batch, heads, rows, head_dim = query.shape
    kv_heads, keys, value_dim = value.shape[1:]
    kernels.half_kernel[(cdiv(max(rows, keys), 64), batch * heads, number)](
        *given, *halves, rows, keys, batch, heads, kv_heads,
        *(stride for x in (*given, *halves) for stride in strides(x)),
        E=head_dim, WIDE=wide(head_dim), V=value_dim, WIDE_V=wide(value_dim), M=64, num_warps=4,
    )  # fmt: skip
    return problem._replace(query=query, key=key, value=value if number == 3 else problem.value)


def prepared(
    problem: Problem,
    out: Tensor,
    rest: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    unit: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dO / unit in the dtype of the problem, and by row the log-sum-exp and delta.

    delta is (dO O - g) / unit for the gradient g of the log-sum-exp, if there is one. Where heads
    meet, both numbers of all heads of a row lie side by side.
    """
    batch, heads, rows, value_dim = out.shape
    mixed = problem.mixing is not None
    scaled = torch.empty_like(out, dtype=problem.query.dtype)
    if mixed:
        copied, delta = lse.new_empty(batch, rows, 2, heads).permute(2, 0, 3, 1)
    else:
        copied, delta = lse, torch.empty_like(lse)
    kernels.row_products_kernel[(cdiv(rows, 64), batch * heads)](
        out, rest, grad_out, lse, lse if grad_lse is None else grad_lse, unit,
        scaled, copied, delta, rows,
        *strides(out), *strides(grad_out), *lse.stride()[:2], *strides(scaled), *delta.stride(),
        heads, V=value_dim, WIDE_V=next_power_of_2(value_dim), RESTED=rest.numel() > 0,
        COPIED=mixed, SUMMED=grad_lse is not None, M=64, num_warps=4,
    )  # fmt: skip
    return scaled, copied, delta


class Sums(NamedTuple):
    """Where dQ, dK and dV go, times `unit`; `add` if several bands add to them."""

    query: Tensor
    key: Tensor
    value: Tensor
    unit: Tensor
    add: bool


def mixed_backward(
    problem: Problem,
    mixer: Mixer,
    mixing: Mixing,
    lse: Tensor,
    delta: Tensor,
    grad_lse: Tensor | None,
    grad_out: Tensor,
    scaled: Tensor,
    sums: Sums,
    tables: list[Tensor],
) -> None:
    """Fill dQ, dK and dV band by band, and the gradients of tables and weights."""
    all_bands = blocks(problem)
    scratch, other = (Scratch.of(problem, all_bands) for _ in range(2))
    walk = mixer.walk(problem, mixing)
    if walk is not None:
        for band in all_bands:
            at, x, y = (band.batch, slice(None), band.rows), scratch.view(band), other.view(band)
            rows = lse[at], delta[at], grad_out[at]
            walk.band(x, y, band, problem, mixing, *rows, sums.unit, tables)
            one_head(x, y, band, problem, scaled[at], sums)
        return walk.gradients(problem, sums.unit, tables)
    slots, table = mixer.Slots.of(problem, mixing, mixer), table_of(problem, mixing)
    for band in all_bands:
        at, part = (band.batch, slice(None), band.rows), problem.part(band)
        x, y, query = scratch.view(band), other.view(band), part.query[:, :, band.rows]
        scores(grad_out[at], part.value, y, band, problem, 1.0, sums.unit)
        scores(query, part.key, x, band, problem, problem.scale)
        if problem.scratch == torch.float32:
            mixer.mix(x, band, problem, mixing)
            wanted = None if grad_lse is None else grad_lse[at]
            balance(x, y, table, band, problem, lse[at], delta[at], scaled[at], wanted, sums.unit)
            scores(query, part.key, x, band, problem, problem.scale)
        x, y = mixer.mix_backward(x, y, band, problem, mixing, lse[at], delta[at], slots)
        one_head(x, y, band, problem, scaled[at], sums)
    slots.gradients(problem, mixing, mixer, sums.unit, tables)


def balance(
    x: Tensor,
    y: Tensor,
    table: Tensor | None,
    band: Band,
    problem: Problem,
    lse: Tensor,
    delta: Tensor,
    scaled: Tensor,
    grad_lse: Tensor | None,
    unit: Tensor,
) -> None:
    """Change delta, dO and dP in Y so that rows of P and dS have their sums; X are logits.

    The band has whole rows.
    """
    batch, heads, rows, value_dim = scaled.shape
    entries = lse if table is None else table
    wanted = lse if grad_lse is None else grad_lse
    tile = tile_of("softmax_value", problem, rows)
    kernels.balance_kernel[(cdiv(rows, tile.rows), batch * heads)](
        x, y, entries, lse, delta, scaled, wanted, unit,
        rows, band.sizes[2], band.shift, entries.shape[1],
        *x.stride()[:2], *delta.stride(), *strides(scaled), *wanted.stride()[:2],
        heads, V=value_dim, WIDE_V=wide(value_dim), CAUSAL=problem.causal,
        TABLED=table is not None, SUMMED=grad_lse is not None, **problem.gated(),
        M=tile.rows, K=tile.keys,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def one_head(
    x: Tensor, y: Tensor, band: Band, problem: Problem, grad_out: Tensor, sums: Sums
) -> None:
    """Fill dQ, dK and dV from P and dA of a band, or add to them."""
    part, keys = problem.part(band), band.keys
    if not sums.add:
        keys = slice(0, problem.key.shape[2])  # those that no row sees have zeros
    query, grad_query = part.query[:, :, band.rows], sums.query[band.batch, :, band.rows]
    grad_key, grad_value = sums.key[band.batch, :, keys], sums.value[band.batch, :, keys]
    (batch, heads, rows, head_dim), kv_heads = query.shape, part.key.shape[1]
    value_dim, place = grad_out.shape[3], (part.key.shape[2], band.shift, problem.scale)
    shape = {**switches(problem), **problem.gated(), "E": head_dim, "WIDE": wide(head_dim)}
    shape["ADD"] = sums.add
    tile = tile_of("grad_query", problem, rows)
    kernels.grad_query_kernel[(cdiv(rows, tile.rows) * heads, batch)](
        y, part.key, sums.unit, grad_query, rows, *place,
        *y.stride()[:2], *strides(part.key), *strides(grad_query),
        heads, **shape, M=tile.rows, K=tile.keys,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    tile = tile_of("grad_key_value", problem, rows)
    kernels.grad_key_value_kernel[(cdiv(grad_key.shape[2], tile.keys) * kv_heads, batch)](
        x, y, query, grad_out, sums.unit, grad_key, grad_value,
        grad_key.shape[2], rows, *place,
        *x.stride()[:2], *strides(query), *strides(grad_out),
        *strides(grad_key), *strides(grad_value),
        kv_heads, **shape, V=value_dim, WIDE_V=wide(value_dim), M=tile.rows, K=tile.keys,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
