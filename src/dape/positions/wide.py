"""Modules whose parameters are float32 or wider, however a model is built, moved or loaded.

bfloat16 cannot tell position 256 from 257, and rounds a slope by as much as 1/256 of itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def widen(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return a tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def parameter(*shape: int) -> nn.Parameter:
    """Return a parameter without values, in float32 or the default dtype if that is wider."""
    return nn.Parameter(widen(torch.empty(shape)))


class Wide(nn.Module):
    """A module that stays in float32 where `.to(torch.bfloat16)` or `.half()` casts a model.

    Numbers of fewer bits that are loaded into it are widened.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Wide":
        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not moved.is_floating_point() or widen(moved[:0]).dtype == moved.dtype:
                return moved
            return tensor.to(moved.device, torch.float32)

        return super()._apply(kept, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for name, _ in self.named_parameters(prefix.removesuffix("."), recurse=False):
            if name in state_dict:
                state_dict[name] = widen(state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, *others)
