"""Launchers of the kernels of a head that pass over the scores of a band, the problem `part`."""

from math import prod

import torch
from torch import Tensor

from dape.attention.fused import bands_kernels as kernels
from dape.attention.fused import overflow
from dape.attention.fused.overflow import asking
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Problem, Result
from dape.attention.fused.rows import Rows
from dape.attention.fused.sizes import PRECISION, Tile, cdiv, padded, strides
from dape.attention.fused.spans import combine, key_spans, parts_of

# The fastest of a few on an H100 at head_dim 64, by `benchmarks/tiles.py`.
TILES = {
    "scores": Tile(64, 128, 4, 2),
    "softmax_value": Tile(64, 64, 4, 4),
    "grad": Tile(64, 64, 4, 3),
}
# Tiles of keys that a program of `scores` walks over.
SPAN = 8


def tile_of(kernel: str, part: Problem) -> Tile:
    """Return the tile of a kernel: small ones for few rows, and where many rows of four bytes are.

    The loads under way of wide heads fit the 99 KiB of shared memory of smaller GPUs.
    """
    tile = TILES[kernel]
    if max(part.query.shape[3], part.value.shape[3]) > (128 if kernel == "scores" else 64):
        tile = tile._replace(num_stages=tile.num_stages - 1)
    if part.scratch == torch.float32 and not part.in_float32:
        tile = Tile(min(tile.rows, 32), min(tile.keys, 32), 4, 2)
    if part.query.shape[2] <= 16 and kernel in ("scores", "softmax_value"):
        tile = tile._replace(rows=16)
    return tile


def scores(
    x: Tensor,
    part: Problem,
    y: Tensor | None = None,
    rows: Rows | None = None,
    flag: Tensor | None = None,
) -> None:
    """Fill X with the scores of a band, and Y, if given, with dP - delta in the unit of the rows.

    A score too large for 16 bits sets the `flag`, if given.
    """
    query, key, value = part[:3]
    batch, heads, count, size = query.shape
    keys, tile = key.shape[2], tile_of("scores", part)
    asks = asking(part, flag, overflow.LARGEST_SCORE)
    out, unit, delta = (x, x, x) if rows is None else (rows.grad_out, rows.unit, rows.delta)
    length = keys if part.wide else SPAN * tile.keys
    others = batch, cdiv(keys, length) * (1 if y is None else 2)
    programs = part.programs(cdiv(count, tile.rows) * heads, prod(others))
    start(kernels.scores_kernel, (programs, *others))(
        query, key, x, out, value, x if y is None else y, part.scale, unit, delta,
        count, keys, part.offset, length, *strides(query), *strides(key), *x.stride()[:2],
        *strides(out), *strides(value), *delta.stride()[:2],
        heads, heads // key.shape[1], E=size, WIDE=padded(size), V=value.shape[3],
        WIDE_V=padded(value.shape[3]), CAUSAL=part.causal, BOTH=y is not None,
        PRECISION=PRECISION, **asks, **tile.launch(),
    )  # fmt: skip


def softmax_value(x: Tensor, part: Problem, found: Result, static: Tensor | None) -> None:
    """Fill the result of a band from its logits, over spans of keys where rows alone are too few.

    `static` is the C of `Mixer`, if the logits lack C. A log-sum-exp too large for 16 bits sets the
    flag.
    """
    value, tile = part.value, tile_of("softmax_value", part)
    batch, heads, rows, value_dim = found.out.shape
    keys = value.shape[2]
    spans, length = key_spans(batch * heads, rows, keys, tile)
    parts, parts_lse = parts_of(found, spans)
    asks = asking(part, found.flag, overflow.largest_sum(found.exact))
    entries = found.lse if static is None else static
    programs = part.programs(cdiv(rows, tile.rows) * heads, batch * spans)
    start(kernels.softmax_value_kernel, (programs, batch, spans))(
        x, value, entries, parts, parts_lse, found.rest, rows, keys, part.offset, length,
        entries.shape[1], *x.stride()[:2], *strides(value),
        *parts.stride()[:4], *parts_lse.stride()[:3],
        heads, heads // value.shape[1], V=value_dim, WIDE_V=padded(value_dim),
        TABLES=0 if static is None else len(static) // heads,
        EXACT=found.exact, RESTED=found.exact and spans == 1, CAUSAL=part.causal,
        PRECISION=PRECISION,
        **asks if spans == 1 else asking(part), **tile.launch(),
    )  # fmt: skip
    combine(parts, parts_lse, asks, found)


def balance(x: Tensor, y: Tensor, part: Problem, rows: Rows, static: Tensor | None) -> None:
    """Change dO and Y, such that rows of P and dS have exact sums; X are logits, perhaps without C.

    The band has whole rows.
    """
    batch, heads, count, value_dim = rows.scaled.shape
    tile, entries = tile_of("softmax_value", part), rows.lse if static is None else static
    wanted = rows.lse if rows.grad_lse is None else rows.grad_lse
    programs = part.programs(cdiv(count, tile.rows) * heads, batch)
    start(kernels.balance_kernel, (programs, batch))(
        x, y, entries, rows.lse, rows.scaled, wanted, rows.unit,
        count, part.key.shape[2], part.offset, entries.shape[1],
        *x.stride()[:2], *rows.lse.stride(), *strides(rows.scaled), *wanted.stride()[:2],
        heads, V=value_dim, WIDE_V=padded(value_dim), TABLED=static is not None,
        SUMMED=rows.grad_lse is not None, CAUSAL=part.causal, **part.gated(), **tile.launch(),
    )  # fmt: skip
