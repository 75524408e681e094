"""Few queries against many keys, by a kernel over spans of keys, without a scratch.

A program holds the logits of all heads of its rows, tile by tile of a span of keys. Keys and values
are read once, and no buffer is as large as the keys.
"""

from typing import Any, NamedTuple

from torch import Tensor

from dape.attention.fused import decode_kernels as kernels
from dape.attention.fused.formed import form_named, rows_of
from dape.attention.fused.geometry import Extent
from dape.attention.fused.overflow import asking
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Problem, Result
from dape.attention.fused.sizes import (
    MOST_ROWS,
    PRECISION,
    Tile,
    cdiv,
    next_power_of_2,
    padded,
    strides,
)
from dape.attention.fused.spans import PROGRAMS, combine, parts_of
from dape.attention.fused.terms import Features, Mixed

# Bands serve more queries, or fewer keys for a query, and read keys once: an estimate.
KEYS_PER_ROW = 16
# Columns of a tile, a column for a head of a row. Beyond, products of all with all cost most.
MOST_COLUMNS = 64
# Keys of a span, so that few keys need no `combine`.
LEAST_SPAN = 64
# Numbers of a row and head that `combine` holds at a time.
MOST_PARTS = 2**14

# Rows of all elements for which programs make their parts of the tables. For more rows a kernel
# makes the tables once.
MOST_MADE = 4
# Heads and hidden units of such programs. More fill the registers.
MOST_HEADS, MOST_UNITS = 16, 32


class Sources(NamedTuple):
    """A bias of few parameters and an adapter, the sources of the tables of `Mixed`.

    W1 is `[D, channels, 1]`. `table_operators.How` explains the last four.
    """

    p0: Tensor | None
    p1: Tensor | None
    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor
    form: str
    span: int
    on_bias: int
    residual: bool


def serves(problem: Problem) -> bool:
    """Return whether a problem has few queries against many keys."""
    rows, keys = problem.query.shape[2], problem.key.shape[2]
    return rows <= MOST_ROWS and keys >= KEYS_PER_ROW * rows


def tile_of(problem: Problem, heads: int, units: int) -> Tile:
    """Return the tile for numbers of heads and units, by shared memory for two programs.

    Two programs of a row have 128 KiB of keys and values under way on a multiprocessor of Hopper,
    more than arrives while both mix.

    With 64 heads or units after padding, four warps share the MLP's products on Hopper (`wgmma`),
    and four further warps would repeat the products. For eight warps, PTXAS 12.8 gave some products
    addresses of other memory, with wrong logits or an illegal access.
    """
    rows = min(next_power_of_2(problem.query.shape[2]), MOST_COLUMNS // heads)
    columns = rows * heads
    num_warps = 4 if columns <= 16 or max(heads, padded(units)) >= 64 else 8
    if problem.query.element_size() == 4:
        return Tile(rows, 32, num_warps, 2)
    keys = 64 if columns < MOST_COLUMNS else 32 if units <= 32 else 16
    wide = max(problem.query.shape[3], problem.value.shape[3]) > 64
    return Tile(rows, keys, num_warps, 3 if wide else 5)


def key_spans(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Return the number of spans of the keys, a power of two, and the length of a span."""
    batch, _, rows, _ = problem.query.shape
    keys = Extent.of(problem).visible(rows)
    wanted = cdiv(PROGRAMS, batch * cdiv(rows, tile.rows))
    spans = next_power_of_2(max(1, min(wanted, cdiv(keys, LEAST_SPAN))))
    spans = min(spans, MOST_PARTS // next_power_of_2(problem.value.shape[3]))
    return spans, cdiv(cdiv(keys, spans), tile.keys) * tile.keys


def tables_of(
    terms: Mixed | Features | Sources, problem: Problem
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return weights and tables, or their sources, and the compile-time arguments."""
    weights, unused = (terms.weight_in, terms.weight_out), problem.query
    how = {
        "FORM": None, "ROWS": 0, "ON_BIAS": -1, "RESIDUAL": False, "F": 0, "FEATURES": 0,
    }  # fmt: skip
    if isinstance(terms, Sources):
        parameters = (unused if x is None else x for x in (terms.p0, terms.p1))
        how |= {"FORM": form_named(terms.form).function, "ROWS": rows_of(terms.p0, terms.span)}
        how |= {"ON_BIAS": terms.on_bias, "RESIDUAL": terms.residual}
        read = (terms.bias_in, terms.bias_out, *parameters, terms.span)
        return (*weights, *read, *[unused] * 4, 2**30), how  # a form knows every distance
    read = (*weights, terms.hidden, terms.static, unused, unused, 0)
    if isinstance(terms, Mixed):
        return (*read, *[unused] * 4, len(terms.hidden)), how
    how |= {"F": len(terms.weight), "FEATURES": padded(len(terms.weight))}
    return (*read, terms.psi, terms.scale, terms.weight, terms.bias, len(terms.psi)), how


def forward(problem: Problem, terms: Mixed | Features | Sources, found: Result) -> None:
    """Fill a result, and set the flag of the result if there is one.

    Logits are in float32 throughout. Numbers beyond the range of 16 bits are therefore served.
    """
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, rows, head_dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    units, channels = terms.weight_in.shape[:2]
    tile = tile_of(problem, padded(heads), units)
    spans, length = key_spans(problem, tile)
    parts, parts_lse = parts_of(found, spans)
    mask = query if problem.mask is None else problem.mask
    flags = {"gate": found.flag, "GATED": -1} if found.flag.numel() else problem.gated()
    read, how = tables_of(terms, problem)
    programs = problem.programs(cdiv(rows, tile.rows), spans * batch)
    start(kernels.decode_kernel, (programs, spans, batch))(
        query, key, value, *read, mask, parts, parts_lse, found.rest,
        rows, Extent.of(problem).visible(rows), channels,
        problem.offset, problem.scale, length,
        *strides(query), *strides(key), *strides(value),
        *parts.stride()[:4], *parts_lse.stride()[:3], mask.stride(0),
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, H=heads, D=units, HEADS=padded(heads),
        UNITS=padded(units),
        E=head_dim, WIDE=padded(head_dim), V=value_dim, WIDE_V=padded(value_dim), **how,
        CAUSAL=problem.causal, MASKED=problem.mask is not None,
        EXACT=found.exact, RESTED=spans == 1 and found.exact, **flags, FLAGS=found.flag.numel() > 0,
        M=tile.rows, K=tile.keys, PRECISION=PRECISION,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    combine(parts, parts_lse, asking(problem), found)
