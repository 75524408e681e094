"""Attention with a static bias, or none: an ordinary kernel of a head with a learnable table."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from dape.attention.fused import static_kernels as kernels
from dape.attention.fused.geometry import Extent, bands, diagonals, lowest_distance
from dape.attention.fused.overflow import asking
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Gradients, Problem, Result
from dape.attention.fused.rows import Rows
from dape.attention.fused.sizes import (
    PRECISION,
    WIDEST_TILE,
    Tile,
    cdiv,
    next_power_of_2,
    padded,
    strides,
)
from dape.attention.fused.spans import combine, key_spans, parts_of
from dape.attention.fused.sums import add_up, fold
from dape.attention.fused.terms import Static

# The fastest of a few on an H100 at head_dim 64, by `benchmarks/tiles.py`.
TILES = {
    "forward": Tile(64, 64, 4, 3),
    "grad_query": Tile(64, 64, 4, 3),
    "grad_key_value": Tile(64, 64, 4, 3),
    "grad_table": Tile(64, 64, 8, 3),
}
LOG2E = 1.4426950408889634


class Bias(NamedTuple):
    """The table of a bias, the size of the table, and a line of 0 or -inf over keys if needed."""

    table: Tensor
    size: int
    line: Tensor | None

    @classmethod
    def of(cls, problem: Problem) -> "Bias":
        """Return the bias of a problem, with -inf at masked keys."""
        (batch, _, rows, _), keys = problem.query.shape, problem.key.shape[2]
        table, size = problem.query, 0
        if isinstance(problem.terms, Static):
            table, size = problem.terms.static, problem.terms.static.shape[1]
        # Where every row ends before the keys do, causality hides columns past the last key.
        ends_unseen = problem.causal and rows + problem.offset <= keys
        if problem.mask is None and (ends_unseen or keys % WIDEST_TILE == 0):
            return cls(table, size, None)
        # The line is padded by as much as two tiles reach.
        line = problem.query.new_zeros(batch, keys, dtype=torch.float32)
        if problem.mask is not None:
            line.masked_fill_(~problem.mask, float("-inf"))
        return cls(table, size, pad(line, (0, 2 * WIDEST_TILE), value=float("-inf")))


def tile_of(kernel: str, problem: Problem) -> Tile:
    """Return the tile of a kernel: small ones for few rows, and where wide rows fill memory."""
    tile, rows = TILES[kernel], problem.query.shape[2]
    if problem.query.element_size() == 4:
        tile = Tile(32, 32, 4, 2)
    elif problem.query.shape[3] > 64:
        tile = Tile(64, 64, 4, 2)
    if rows <= 64 and kernel == "forward":
        tile = tile._replace(rows=min(tile.rows, max(16, next_power_of_2(rows))))
    return tile


def shared(problem: Problem, bias: Bias) -> dict[str, Any]:
    """Return the compile-time arguments of every kernel."""
    head_dim, value_dim = problem.query.shape[3], problem.value.shape[3]
    return {
        "GROUP": problem.query.shape[1] // problem.key.shape[1],
        "E": head_dim,
        "WIDE": padded(head_dim),
        "V": value_dim,
        "WIDE_V": padded(value_dim),
        "CAUSAL": problem.causal,
        "LINED": bias.line is not None,
        "PRECISION": PRECISION,
    }


def forward(problem: Problem, found: Result) -> None:
    """Fill a result, over spans of keys where rows are too few programs."""
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, rows, _ = query.shape
    bias, tile = Bias.of(problem), tile_of("forward", problem)
    visible = Extent.of(problem).visible(rows)
    spans, length = key_spans(batch * heads, rows, visible, tile)
    parts, parts_lse = parts_of(found, spans)
    line = query if bias.line is None else bias.line
    start(kernels.forward_kernel, (cdiv(rows, tile.rows) * heads, batch, spans))(
        query, key, value, bias.table, line, parts, parts_lse, found.rest,
        rows, visible, bias.size, problem.offset,
        problem.scale * LOG2E, length,
        *strides(query), *strides(key), *strides(value),
        *parts.stride()[:4], *parts_lse.stride()[:3], line.stride(0),
        heads, RESTED=spans == 1 and found.exact, **shared(problem, bias), **tile.launch(),
    )  # fmt: skip
    combine(parts, parts_lse, asking(problem), found)


class Given(NamedTuple):
    """The arguments that the kernels of the backward pass share."""

    bias: Bias
    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem, rows: Rows) -> "Given":
        """Return the arguments for the rows of a problem."""
        query, key, value = problem.query, problem.key, problem.value
        bias = Bias.of(problem)
        line = query if bias.line is None else bias.line
        places = (
            *strides(query), *strides(key), *strides(value), *strides(rows.scaled),
            *rows.lse.stride()[:2], line.stride(0),
        )  # fmt: skip
        tensors = (query, key, value, rows.scaled, bias.table, line, rows.lse, rows.delta)
        return cls(bias, tensors, (query.shape[2], key.shape[2], bias.size), places)


def backward(
    problem: Problem, rows: Rows, into: Gradients, tables: Sequence[Float[Tensor, "..."]]
) -> None:
    """Fill dQ, dK and dV, and the gradient of the last table or no table."""
    given, terms = Given.of(problem, rows), problem.terms
    grad_query(problem, rows, given, into)
    jacobian = terms.jacobian if tables and isinstance(terms, Static) else None
    grad_key_value(problem, rows, given, into, jacobian, tables)
    if tables and jacobian is None:
        grad_table(problem, rows, given, tables[0])


def grad_query(problem: Problem, rows: Rows, given: Given, into: Gradients) -> None:
    """Fill dQ and correct delta."""
    batch, heads, count, _ = problem.query.shape
    tile, summed = tile_of("grad_query", problem), rows.grad_lse is not None
    grad_lse = rows.lse if rows.grad_lse is None else rows.grad_lse
    start(kernels.grad_query_kernel, (cdiv(count, tile.rows) * heads, batch))(
        *given.tensors, grad_lse, rows.unit, into.query,
        *given.sizes, problem.offset, problem.scale,
        *given.places, *strides(into.query), *grad_lse.stride()[:2],
        heads, SUMMED=summed, **shared(problem, given.bias), **tile.launch(),
    )  # fmt: skip


def grad_key_value(
    problem: Problem,
    rows: Rows,
    given: Given,
    into: Gradients,
    jacobian: Float[Tensor, "parameters heads distances"] | None,
    tables: Sequence[Tensor],
) -> None:
    """Fill dK and dV, and with a Jacobian the gradient of the parameters of a bias."""
    batch, kv_heads, keys, _ = problem.key.shape
    tile, (number, heads) = tile_of("grad_key_value", problem), (0, problem.query.shape[1])
    programs, sums = cdiv(keys, tile.keys), rows.lse
    if jacobian is not None:
        number = len(jacobian)
        sums = rows.lse.new_empty(batch, programs, number * heads)
    start(kernels.grad_key_value_kernel, (programs * kv_heads, batch))(
        *given.tensors, sums if jacobian is None else jacobian, sums, rows.unit,
        into.key, into.value, *given.sizes, problem.offset, problem.scale,
        *given.places, *strides(into.key), *strides(into.value),
        kv_heads, PARAMETERS=number, **shared(problem, given.bias), **tile.launch(),
    )  # fmt: skip
    if jacobian is not None:
        add_up(problem, sums, (number, heads), rows.unit, tables[0])


def grad_table(
    problem: Problem, rows: Rows, given: Given, table: Float[Tensor, "heads distances"]
) -> None:
    """Fill the gradient of C from sums of dS along diagonals."""
    batch, heads = problem.query.shape[:2]
    tile = tile_of("grad_table", problem)
    size = tile.rows
    where = diagonals(problem, bands(problem)[0], size, size)
    cells = rows.lse.new_empty(heads, where.number, size, size)
    start(kernels.grad_table_kernel, (heads * where.number,))(
        *given.tensors, cells, *given.sizes, where.first, where.band_tile, where.offset,
        problem.scale, batch, *given.places,
        heads, **shared(problem, given.bias), M=size, **tile.pace(),
    )  # fmt: skip
    # Rows lie reversed. A diagonal of dS is therefore a column.
    steps = size - 1, size * size, 1, where.number * size * size
    lines = cells.as_strided((size, where.number, 2 * size - 1, heads), steps)
    first = lowest_distance(problem, size, size)
    fold(problem, lines, first, size, rows.unit, table.t(), skewed=True)
