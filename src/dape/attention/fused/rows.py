"""Numbers of every row for the backward pass, and the computation in 16 bits.

Two-byte types compute in fp16, which has more digits than bf16. The gradient of the output is
divided by a power of two, `unit`, to order 1. All gradients are multiplied by `unit` in the end,
exactly. `unit` is no less than the gradient of the log-sum-exp either.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused import rows_kernels as kernels
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Band, Problem, Result
from dape.attention.fused.sizes import WIDEST_TILE, cdiv, next_power_of_2, padded, strides
from dape.attention.fused.terms import Nothing, Static

# Numbers that a program reads at a time in search of the largest.
LOADS = 4096


class Rows(NamedTuple):
    """The gradients of output and log-sum-exp, and by row the log-sum-exp and delta.

    `scaled` is dO / unit in the dtype of the problem. delta is (dO O - g) / unit for the gradient g
    of the log-sum-exp, if given. For mixed heads, the log-sum-exps of all heads of a row are
    neighbours in memory. Otherwise the log-sum-exp is in base 2, and both are padded, with an
    infinite log-sum-exp past the last row and therefore P = 0. A bias above zero would else make P
    large, and infinite in fp16. Rows without a visible key have log-sum-exp 0.
    """

    lse: Float[Tensor, "batch heads lines"]
    delta: Float[Tensor, "batch heads lines"]
    scaled: Float[Tensor, "batch heads rows value_dim"]
    grad_out: Float[Tensor, "batch heads rows value_dim"]
    grad_lse: Float[Tensor, "batch heads rows"] | None
    unit: Float[Tensor, ""]

    @classmethod
    def of(
        cls, problem: Problem, found: Result, grad_out: Tensor, grad_lse: Tensor | None
    ) -> "Rows":
        """Return the rows of a problem in fp16, or float32, from result and gradients."""
        exact = problem.query.dtype == torch.float32
        unit = found.lse.new_empty(())
        largest = unit[None] if exact else _largest(grad_out, grad_lse)
        batch, heads, rows, value_dim = found.out.shape
        lse, mixed = found.lse, not isinstance(problem.terms, Nothing | Static)
        scaled = torch.empty_like(found.out, dtype=problem.query.dtype)
        if mixed:
            copied, delta = lse.new_empty(batch, rows, heads).transpose(1, 2), torch.empty_like(lse)
        else:
            lines = cdiv(rows, WIDEST_TILE) * WIDEST_TILE
            copied, delta = (lse.new_empty(batch, heads, lines) for _ in range(2))
        start(kernels.row_products_kernel, (cdiv(copied.shape[2], 64), batch * heads))(
            found.out, found.rest, grad_out, lse, lse if grad_lse is None else grad_lse, largest,
            unit, scaled, copied, delta, rows, *strides(found.out), *strides(grad_out),
            *lse.stride()[:2], *strides(scaled), *copied.stride(), *delta.stride()[:2],
            heads, V=value_dim, WIDE_V=next_power_of_2(value_dim), RESTED=found.exact,
            PADDED=not mixed, SUMMED=grad_lse is not None,
            PARTS=0 if exact else len(largest), M=64, num_warps=4,
        )  # fmt: skip
        return cls(copied, delta, scaled, grad_out, grad_lse, unit)

    def at(self, band: Band) -> "Rows":
        """Return the rows of a band."""
        place, grad_lse = (band.batch, slice(None), band.rows), self.grad_lse
        return self._replace(
            lse=self.lse[place],
            delta=self.delta[place],
            scaled=self.scaled[place],
            grad_out=self.grad_out[place],
            grad_lse=None if grad_lse is None else grad_lse[place],
        )


def _largest(grad_out: Tensor, grad_lse: Tensor | None) -> Float[Tensor, "parts"]:
    """Return the largest numbers of so many parts of both gradients, a power of two."""
    batch, heads, rows, value_dim = grad_out.shape
    wide = next_power_of_2(value_dim)
    at_once = max(1, LOADS // wide)
    tiles = batch * heads * cdiv(rows, at_once)
    found = grad_out.new_empty(min(1024, next_power_of_2(tiles)), dtype=torch.float32)
    start(kernels.largest_kernel, (len(found),))(
        grad_out, grad_out if grad_lse is None else grad_lse, found, rows, heads, tiles,
        *strides(grad_out), V=value_dim, WIDE_V=wide,
        SUMMED=grad_lse is not None, M=at_once, num_warps=4,
    )  # fmt: skip
    return found


def in_half(problem: Problem) -> Problem:
    """Return a problem with bf16 in fp16, at most the largest number that both types hold.

    V keeps its dtype where heads mix, since V meets dO and no number of the scratch.
    """
    given = problem.query, problem.key, problem.value
    if problem.query.dtype != torch.bfloat16:
        return problem
    number = 3 if isinstance(problem.terms, Nothing | Static) else 2
    query, key, value = halves = [torch.empty_like(x, dtype=torch.float16) for x in given]
    batch, heads, rows, head_dim = query.shape
    kv_heads, keys, value_dim = value.shape[1:]
    start(kernels.half_kernel, (cdiv(max(rows, keys), 64), batch * heads, number))(
        *given, *halves, rows, keys, batch, heads, kv_heads,
        *(stride for x in (*given, *halves) for stride in strides(x)),
        E=head_dim, WIDE=padded(head_dim), V=value_dim, WIDE_V=padded(value_dim), M=64,
        num_warps=4,
    )  # fmt: skip
    return problem._replace(query=query, key=key, value=value if number == 3 else problem.value)
