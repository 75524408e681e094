"""Attention with a static bias, or none: an ordinary kernel of one head with a learnable table."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dape.attention.fused import static_kernels as kernels
from dape.attention.fused.banded import PRECISION, Sums, Tile, asking, combine, key_spans, wide
from dape.attention.fused.geometry import Problem, bands, cdiv, diagonals, next_power_of_2, strides
from dape.attention.fused.slots import fold, lowest

# The fastest of a few on an H100 at head_dim 64, by `benchmarks/tiles.py`.
TILES = {
    "forward": Tile(64, 64, 4, 3),
    "grad_query": Tile(64, 64, 4, 3),
    "grad_key_value": Tile(64, 64, 4, 3),
    "grad_table": Tile(64, 64, 8, 3),
}
# No tile is wider; the line is padded by as much as two tiles reach.
WIDEST_TILE = 128
LOG2E = 1.4426950408889634


class Bias(NamedTuple):
    """The table of a bias, its size, and a line of 0 or -inf over keys if needed."""

    table: Tensor
    size: int
    line: Tensor | None

    @classmethod
    def of(cls, problem: Problem) -> "Bias":
        """Return the bias of a problem, with what nobody may see at -inf."""
        (batch, _, rows, _), keys = problem.query.shape, problem.key.shape[2]
        table, size = problem.query, 0
        if problem.static is not None:
            table, size = problem.static, problem.static.shape[1]
        # Where every row ends before the keys do, causality hides what is past the last key.
        ends_unseen = problem.causal and rows + problem.offset <= keys
        if problem.mask is None and (ends_unseen or keys % WIDEST_TILE == 0):
            return cls(table, size, None)
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
        "WIDE": wide(head_dim),
        "V": value_dim,
        "WIDE_V": wide(value_dim),
        "LINED": bias.line is not None,
        "PRECISION": PRECISION,
    }


def forward(problem: Problem, out: Tensor, lse: Tensor, rest: Tensor) -> None:
    """Fill what `banded.forward` returns, over spans of keys where rows are too few programs."""
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, rows, _ = query.shape
    bias, tile, band = Bias.of(problem), tile_of("forward", problem), bands(problem)[0]
    spans, length = key_spans(problem, band, tile)
    parts, parts_lse = out[None], lse[None]
    if spans > 1:
        parts = query.new_empty(spans, *out.shape, dtype=torch.float32)
        parts_lse = query.new_empty(spans, *lse.shape, dtype=torch.float32)
    line = query if bias.line is None else bias.line
    kernels.forward_kernel[(cdiv(rows, tile.rows), batch * heads, spans)](
        query, key, value, bias.table, line, parts, parts_lse, rest,
        rows, band.sizes[2], bias.size, problem.offset,
        problem.scale * LOG2E, length,
        *strides(query), *strides(key), *strides(value),
        *parts.stride()[:4], *parts_lse.stride()[:3], line.stride(0),
        heads, **shared(problem, bias), CAUSAL=problem.causal,
        RESTED=spans == 1 and rest.numel() > 0, M=tile.rows, K=tile.keys,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if spans > 1:
        combine(parts, parts_lse, asking(problem, None), out, lse, rest)


def backward(
    problem: Problem,
    lse: Tensor,
    delta: Tensor,
    grad_lse: Tensor | None,
    grad_out: Tensor,
    sums: Sums,
) -> list[Tensor]:
    """Fill dQ, then with `delta` as that corrects it dK and dV; return dC `[H, N]` if any."""
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, rows, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    bias = Bias.of(problem)
    shape = shared(problem, bias)
    line = query if bias.line is None else bias.line
    tensors = (query, key, value, grad_out, bias.table, line, lse, delta)
    places = (
        *strides(query), *strides(key), *strides(value), *strides(grad_out), *lse.stride()[:2],
    )  # fmt: skip
    tile = tile_of("grad_query", problem)
    kernels.grad_query_kernel[(cdiv(rows, tile.rows), batch * heads)](
        *tensors, lse if grad_lse is None else grad_lse, sums.unit, sums.query,
        rows, keys, bias.size, problem.offset, problem.scale,
        *places, *strides(sums.query), line.stride(0),
        heads, **shape, CAUSAL=problem.causal, SUMMED=grad_lse is not None,
        M=tile.rows, K=tile.keys, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    tile = tile_of("grad_key_value", problem)
    kernels.grad_key_value_kernel[(cdiv(keys, tile.keys), batch * kv_heads)](
        *tensors, sums.unit, sums.key, sums.value,
        rows, keys, bias.size, problem.offset, problem.scale,
        *places, *strides(sums.key), *strides(sums.value), line.stride(0),
        kv_heads, **shape, CAUSAL=problem.causal, M=tile.rows, K=tile.keys,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if problem.static is None:
        return []
    tile = tile_of("grad_table", problem)
    size = tile.rows
    where = diagonals(problem, bands(problem)[0], size, size)
    cells = query.new_empty(heads, where.number, size, size, dtype=torch.float32)
    kernels.grad_table_kernel[(heads, where.number)](
        *tensors, cells, rows, keys, bias.size,
        where.first, where.band_tile, where.offset, problem.scale, batch,
        *places, line.stride(0),
        heads, **shape, CAUSAL=problem.causal, M=size, num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    # A row lies reversed, so that one line further is one column further in all of them.
    steps = size - 1, size * size, 1, where.number * size * size
    lines = cells.as_strided((size, where.number, 2 * size - 1, heads), steps)
    gradient = torch.empty_like(problem.static)
    place = lowest(problem, size, size), size
    fold(problem, lines, *place, sums.unit, gradient.t(), skewed=True)
    return [gradient]
