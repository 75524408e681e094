"""Launcher of the kernel of a head for dQ, dK and dV of a band, the problem `part`."""

from torch import Tensor

from dape.attention.fused import grad_kernels as kernels
from dape.attention.fused.bands import tile_of
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Problem, Sum
from dape.attention.fused.rows import Rows
from dape.attention.fused.sizes import PRECISION, cdiv, padded, strides


def gradients(
    x: Tensor, y: Tensor, part: Problem, rows: Rows, queries: Sum, keys: Sum, values: Sum
) -> None:
    """Fill dQ, dK and dV from P and dA of a band, by one kernel.

    Where dA of some elements fits the L2 cache, dA is read from device memory once.
    """
    batch, heads, count, size = part.query.shape
    kv_heads, stored, value_dim = values.new.shape[1:]
    tile = tile_of("grad", part)
    tiles = cdiv(count, tile.rows) * heads + cdiv(stored, tile.keys) * kv_heads
    start(kernels.grad_kernel, (part.programs(tiles, batch), batch))(
        x, y, part.query, part.key, rows.scaled, rows.unit, *queries[:2], *keys[:2],
        *values[:2], queries.summed, values.summed,
        stored, count, part.key.shape[2], part.offset, part.scale,
        *x.stride()[:2], *strides(part.query), *strides(part.key), *strides(rows.scaled),
        *strides(queries.old), *strides(queries.new), *strides(keys.new), *strides(values.new),
        heads, heads // kv_heads, E=size, WIDE=padded(size), V=value_dim,
        WIDE_V=padded(value_dim), CAUSAL=part.causal, PRECISION=PRECISION,
        **part.gated(), **tile.launch(),
    )  # fmt: skip
