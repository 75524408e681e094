"""Few rows against many keys: the keys are split into spans, and the results merged."""

from typing import Any

import torch
from torch import Tensor

from dape.attention.fused import spans_kernels as kernels
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Result
from dape.attention.fused.sizes import Tile, cdiv, next_power_of_2, padded, strides

# Programs that keep a large GPU busy, of all heads or of one. Few rows are split over spans of keys
# to have as many. A multiprocessor has room for two programs of all heads, and for five of one.
PROGRAMS, PROGRAMS_OF_A_HEAD = 256, 512
# Columns of a row that a program of `combine` adds up, few for many programs. Where rows alone are
# many programs, a program adds up as many numbers, of whole rows: the start of a program costs more
# than the sum of a row.
COLUMNS, NUMBERS = 16, 4096


def key_spans(heads: int, rows: int, keys: int, tile: Tile) -> tuple[int, int]:
    """Return the number of spans of the keys, a power of two, and the length of a span.

    `heads` counts the heads of all elements.
    """
    programs = cdiv(rows, tile.rows) * heads
    wanted = max(1, min(PROGRAMS_OF_A_HEAD // programs, keys // 256, 64))
    spans = 1 << (wanted.bit_length() - 1)
    return spans, cdiv(cdiv(keys, spans), tile.keys) * tile.keys


def parts_of(found: Result, spans: int) -> tuple[Tensor, Tensor]:
    """Return room for output and log-sum-exp of every span; a single span fills the result."""
    if spans == 1:
        return found.out[None], found.lse[None]
    parts = found.out.new_empty(spans, *found.out.shape, dtype=torch.float32)
    return parts, found.lse.new_empty(spans, *found.lse.shape)


def tile_of(spans: int, heads: int, rows: int, value_dim: int) -> tuple[int, int]:
    """Return the rows and columns of the output that a program of `combine` adds up."""
    if rows * heads <= PROGRAMS_OF_A_HEAD:
        return 1, COLUMNS
    columns = padded(value_dim)
    return min(next_power_of_2(rows), max(1, NUMBERS // (spans * columns))), columns


def combine(parts: Tensor, parts_lse: Tensor, asks: dict[str, Any], found: Result) -> None:
    """Fill a result from the results of several spans, on the first axis.

    `asks` are the arguments of `overflow.asking`.
    """
    spans, batch, heads, rows, value_dim = parts.shape
    if spans == 1:
        return
    tile_rows, columns = tile_of(spans, batch * heads, rows, value_dim)
    programs = cdiv(rows, tile_rows), batch * heads, cdiv(value_dim, columns)
    start(kernels.combine_kernel, programs)(
        parts, parts_lse, found.out, found.lse, found.rest, rows,
        parts.stride(0), value_dim, parts_lse.stride(0),
        *strides(found.out), *found.lse.stride()[:2],
        heads, V=value_dim, M=tile_rows, COLUMNS=columns, SPANS=spans,
        RESTED=found.exact, **asks, num_warps=4,
    )  # fmt: skip
