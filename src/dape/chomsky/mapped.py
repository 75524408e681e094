"""Encoders on a leading axis of models: their parameters, and modules mapped over the axis."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import pad

from dape.chomsky.encoder import Encoder, EncoderLayer
from dape.chomsky.heads import Heads, served

if TYPE_CHECKING:
    from dape.model.configuration import DapeConfig

ALIGNED = 4  # parameters begin at multiples of this number of elements, 16 bytes of float32


def padded(shape: torch.Size) -> int:
    """Return the number of elements of a parameter and of the gap after it."""
    return -(-shape.numel() // ALIGNED) * ALIGNED


def flatten(model: Encoder) -> Float[Tensor, " parameters"]:
    """Return the parameters of a model in a row."""
    return torch.cat(
        [
            pad(p.detach().flatten(), (0, padded(p.shape) - p.numel()))
            for _, p in model.named_parameters()
        ]
    )


def views(
    flat: Float[Tensor, "models parameters"], shapes: Mapping[str, torch.Size]
) -> dict[str, Float[Tensor, "models ..."]]:
    """Return the parameters of some shapes by name, views of `flat`."""
    pieces = flat.split([padded(shape) for shape in shapes.values()], dim=1)
    return {
        name: piece[:, : shape.numel()].unflatten(1, shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def repeated(x: Tensor, copies: int) -> Tensor:
    """Return copies of every row, side by side."""
    return x[:, None].expand(-1, copies, *x.shape[1:]).flatten(0, 1).contiguous()


class Method(nn.Module):
    """A method of an encoder as a module, for `functional_call`."""

    def __init__(self, encoder: Encoder, method: Callable[..., Tensor]) -> None:
        super().__init__()
        self.encoder, self.method = encoder, method

    def forward(self, *arguments: Any) -> Tensor:
        """Return the result of the method."""
        return self.method(self.encoder, *arguments)


def within(prefix: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters by their names in an enclosing module."""
    return {f"{prefix}.{name}": parameter for name, parameter in parameters.items()}


Stacked = Callable[..., Tensor]


def stacked(module: nn.Module, axes: tuple[int | None, ...]) -> Stacked:
    """Return a function that maps a module over a leading axis of its parameters.

    The function takes parameters by name, then the arguments of the module, with the axis of the
    models at `axes`.
    """

    def one(parameters: dict[str, Tensor], *arguments: Any) -> Tensor:
        found: Tensor = functional_call(module, parameters, arguments)
        return found

    def each(parameters: dict[str, Tensor], *arguments: Any) -> Tensor:
        own = (None if x is None else axis for x, axis in zip(arguments, axes, strict=True))
        found: Tensor = vmap(one, in_dims=(0, *own))(parameters, *arguments)
        return found

    return each


def block_of(config: "DapeConfig") -> Stacked:
    """Return a block of an encoder as a function of stacked parameters."""
    with torch.device("meta"):
        block = EncoderLayer(config, 0).eval()
    if served(block.self_attn.adapter):
        block.self_attn.adapter.__class__ = Heads
    return stacked(block, (0, 0, 1))
