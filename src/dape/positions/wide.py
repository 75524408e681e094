"""Modules with parameters in float32 or wider after any construction, cast or load of a model.

bfloat16 cannot tell position 256 from 257, and rounds a slope by up to 1/256 of the value.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def widen(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return a tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def parameter(*shape: int) -> nn.Parameter:
    """Return an uninitialised parameter, in the wider of float32 and the default dtype."""
    return nn.Parameter(widen(torch.empty(shape)))


def without_overflow(positions: Tensor) -> Tensor:
    """Return positions whose differences do not overflow, such as those of 8 bits."""
    small = not positions.is_floating_point() and positions.itemsize <= 2
    return positions.long() if small else positions


def own_dtypes(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which products keep the dtypes of the factors, without autocast."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class Wide(nn.Module):
    """A module that stays in float32 where `.to(torch.bfloat16)` or `.half()` casts a model.

    Loading widens numbers of fewer bits.
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
