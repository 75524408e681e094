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
from dape.attention.fused.terms import Mixed

# Bands serve more queries, or fewer keys for a query, and read keys once: an estimate.
KEYS_PER_ROW = 16
# Columns of a tile, a column for a head of a row. Beyond, products of all with all cost most.
MOST_COLUMNS = 64
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


def tile_of(problem: Problem, heads: int) -> Tile:
    """Return the tile for a number of heads: 64 keys are the rows of a product on Hopper.

    Two blocks of a row fit a multiprocessor, with 24 KiB of keys or values under way in a block.
    """
    rows = min(next_power_of_2(problem.query.shape[2]), MOST_COLUMNS // heads)
    num_warps = 4 if rows * heads <= 16 else 8
    if problem.query.element_size() == 4:
        return Tile(rows, 32, num_warps, 2)
    return Tile(rows, 64, num_warps, 4 if problem.query.shape[3] <= 64 else 3)


def key_spans(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Return the number of spans of the keys, a power of two, and the length of a span."""
    batch, _, rows, _ = problem.query.shape
    keys = Extent.of(problem).visible(rows)
    wanted = cdiv(PROGRAMS, batch * cdiv(rows, tile.rows))
    spans = next_power_of_2(max(1, min(wanted, cdiv(keys, tile.keys))))
    spans = min(spans, MOST_PARTS // next_power_of_2(problem.value.shape[3]))
    return spans, cdiv(cdiv(keys, spans), tile.keys) * tile.keys


def tables_of(terms: Mixed | Sources, problem: Problem) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return weights and tables, or their sources, and the compile-time arguments."""
    weights, unused = (terms.weight_in, terms.weight_out), problem.query
    if isinstance(terms, Mixed):
        how = {"FORM": None, "ROWS": 0, "ON_BIAS": -1, "RESIDUAL": False}
        return (*weights, terms.hidden, terms.static, unused, unused, 0), how
    parameters = (unused if x is None else x for x in (terms.p0, terms.p1))
    form = form_named(terms.form).function
    how = {
        "FORM": form, "ROWS": rows_of(terms.p0, terms.span),
        "ON_BIAS": terms.on_bias, "RESIDUAL": terms.residual,
    }  # fmt: skip
    return (*weights, terms.bias_in, terms.bias_out, *parameters, terms.span), how


def forward(problem: Problem, terms: Mixed | Sources, found: Result) -> None:
    """Fill a result, and set the flag of the result if there is one.

    Logits are in float32 throughout. Numbers beyond the range of 16 bits are therefore served.
    """
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, rows, head_dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    units, channels = terms.weight_in.shape[:2]
    tile = tile_of(problem, padded(heads))
    spans, length = key_spans(problem, tile)
    parts, parts_lse = parts_of(found, spans)
    mask = query if problem.mask is None else problem.mask
    flags = {"gate": found.flag, "GATED": -1} if found.flag.numel() else problem.gated()
    read, how = tables_of(terms, problem)
    # A form knows every distance.
    size = len(terms.hidden) if isinstance(terms, Mixed) else 2**30
    start(kernels.decode_kernel, (cdiv(rows, tile.rows), spans, batch))(
        query, key, value, *read, mask, parts, parts_lse, found.rest,
        rows, Extent.of(problem).visible(rows), size, channels,
        problem.offset, problem.scale, length,
        *strides(query), *strides(key), *strides(value),
        *parts.stride()[:4], *parts_lse.stride()[:3], mask.stride(0),
        kv_heads, heads // kv_heads, H=heads, D=units, HEADS=padded(heads), UNITS=padded(units),
        E=head_dim, WIDE=padded(head_dim), V=value_dim, WIDE_V=padded(value_dim), **how,
        CAUSAL=problem.causal, MASKED=problem.mask is not None,
        EXACT=found.exact, RESTED=spans == 1 and found.exact, **flags, FLAGS=found.flag.numel() > 0,
        M=tile.rows, K=tile.keys, PRECISION=PRECISION,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    combine(parts, parts_lse, asking(problem, None), found)
