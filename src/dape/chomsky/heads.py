"""DAPE's map across heads for many small models at once, without hidden units in memory.

The formula of `DAPE` writes hidden units to memory and reads them several times. The units are most
of the memory traffic of a training of small models. A kernel keeps units in registers, for DAPE V2
too.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dape.attention.fused.sizes import cdiv, next_power_of_2, padded
from dape.device import has_triton
from dape.positions.adapter import DAPE, Rows

PAIRS = 64  # queries and keys of a tile
STAGES = 1  # of loads; loads ahead take shared memory, and fewer programs run side by side
PROGRAMS = 1024  # that fill a GPU
MOST_HEADS, MOST_UNITS, MOST_TAPS = 8, 64, 3  # that fit 99 KiB of shared memory


class Heads(DAPE):
    """DAPE for calls in which a query sees every key, in float32 on a GPU by a kernel."""

    def forward(
        self,
        scores: Float[Tensor, "batch heads query key"],
        bias: Float[Tensor, "*#batch heads query key"],
        rows: Rows | None = None,
    ) -> Float[Tensor, "batch heads query key"]:
        """Return the logits."""
        if not (served(self) and serves(scores) and bias.ndim == 3):
            return super().forward(scores, bias, rows)
        weights = self.weight_in, self.bias_in, self.weight_out, self.bias_out
        return mapped(scores, bias, *weights, residual=self.residual)


def served(adapter: Any) -> bool:
    """Return whether the kernels compute the formula of an adapter, and are of its size."""
    if not isinstance(adapter, DAPE) or adapter.num_heads > MOST_HEADS:
        return False
    small = adapter.hidden <= MOST_UNITS and adapter.kernel_size <= MOST_TAPS
    return small and adapter.inputs == "concat"


def serves(scores: Tensor) -> bool:
    """Return whether the kernels take a tensor; an example has indices of 32 bits."""
    small = 2 * scores.shape[1:].numel() < 2**31
    return small and scores.is_cuda and scores.dtype == torch.float32 and has_triton()


def mapped(
    scores: Float[Tensor, "batch heads query key"],
    bias: Float[Tensor, "heads query key"],
    weight_in: Float[Tensor, "units channels taps"],
    bias_in: Float[Tensor, " units"],
    weight_out: Float[Tensor, "heads units taps"],
    bias_out: Float[Tensor, " heads"],
    residual: bool = True,
) -> Float[Tensor, "batch heads query key"]:
    """Return A + B + f([A; B]), or A + f([A; B]) without `residual`; every key is visible.

    The function can be differentiated, and mapped by `torch.func.vmap`.
    """
    given = scores, bias, weight_in, bias_in, weight_out, bias_out
    logits: Tensor = _Forward.apply(*(x[None] for x in given), residual)
    return logits.squeeze(0)


def _in_groups(
    function: Callable[..., Any], size: int, axes: tuple[int | None, ...], given: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Return the results of mapped calls, and their axes, with the calls as groups."""
    groups = [
        (x.movedim(axis, 0) if axis is not None else x.expand(size, *x.shape)).flatten(0, 1)
        for x, axis in zip(given[:-1], axes[:-1], strict=True)
    ]
    found = function(*groups, given[-1])
    if isinstance(found, Tensor):
        return found.unflatten(0, (size, -1)), 0
    return tuple(x.unflatten(0, (size, -1)) for x in found), (0,) * len(found)


class _Forward(torch.autograd.Function):
    """Logits of groups; every tensor has a leading axis of groups."""

    @staticmethod
    def forward(*given: Any) -> Tensor:
        from dape.chomsky.heads_kernels import heads_kernel

        *tensors, residual = given
        scores, (bias, *weights) = tensors[0].contiguous(), map(_rows, tensors[1:])
        (groups, batch), places, (tiles, sizes) = scores.shape[:2], bias.shape[2:], _sizes(tensors)
        out, shares = torch.empty_like(scores), max(1, min(batch, PROGRAMS // (tiles * groups)))
        heads_kernel[tiles, groups, shares](
            scores, bias, *weights, out, batch, *places, *(x.stride(0) for x in (bias, *weights)),
            **sizes, RESIDUAL=residual, num_warps=4, num_stages=STAGES,
        )  # fmt: skip
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.residual = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_Backward.apply(*ctx.saved_tensors, grad, ctx.residual), None

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
        return _in_groups(_Forward.apply, info.batch_size, axes, given)


class _Backward(torch.autograd.Function):
    """Gradients of all tensors of groups. A further gradient is not supported."""

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, ...]:
        from dape.chomsky.heads_kernels import heads_backward_kernel

        *tensors, grad, residual = given
        scores, (bias, *weights) = tensors[0].contiguous(), map(_rows, tensors[1:])
        (groups, batch), places, (tiles, sizes) = scores.shape[:2], bias.shape[2:], _sizes(tensors)
        grad_scores, grad_bias = torch.empty_like(scores), torch.empty_like(bias).contiguous()
        shapes = [x.shape[1:] for x in tensors[2:]]
        counts = [shape.numel() for shape in shapes]
        sums = scores.new_empty(groups, tiles, sum(counts))
        heads_backward_kernel[tiles, groups](
            scores, bias, *weights[:3], grad.contiguous(), grad_scores, grad_bias, sums,
            batch, *places, *(x.stride(0) for x in (bias, *weights[:3])),
            **sizes, RESIDUAL=residual, num_warps=4, num_stages=STAGES,
        )  # fmt: skip
        pieces = sums.sum(1).split(counts, dim=1)
        found = (x.unflatten(1, shape) for x, shape in zip(pieces, shapes, strict=True))
        return grad_scores, grad_bias, *found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("the kernels across heads have no second derivative")

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
        return _in_groups(_Backward.apply, info.batch_size, axes, given)


def _rows(x: Tensor) -> Tensor:
    """Return a tensor whose groups are contiguous, at any distance from each other."""
    return x if x[0].is_contiguous() else x.contiguous()


def _sizes(tensors: list[Tensor]) -> tuple[int, dict[str, int]]:
    """Return the number of tiles, and the compile-time sizes of the kernels."""
    (heads, queries, keys), (units, _, taps) = tensors[1].shape[1:], tensors[2].shape[1:]
    tiles = cdiv(queries * (keys + taps // 2), PAIRS - 2 * (taps // 2))
    columns = padded(next_power_of_2(heads) * next_power_of_2(taps))
    return tiles, {
        **{"H": heads, "D": units, "TAPS": taps, "HEADS": columns // next_power_of_2(taps)},
        **{"P": columns, "UNITS": padded(units), "N": PAIRS},
    }
