"""Encoders on a leading axis of models: their parameters, and modules mapped over the axis."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import pad

from dape.chomsky.encoder import Encoder, EncoderLayer
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


class _Linear(nn.Linear):
    """A linear layer as a formula."""

    def forward(self, x: Tensor) -> Tensor:
        product = torch.einsum("...c,dc->...d", x, self.weight)
        return product if self.bias is None else product + self.bias


class _LayerNorm(nn.LayerNorm):
    """A layer norm as a formula."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def block_of(config: DapeConfig, formulas: bool = False) -> Stacked:
    """Return a block of an encoder as a function of stacked parameters.

    With `formulas` a block has formulas in place of PyTorch's layers. A compilation under `vmap`
    would fix the length of the tokens for the layers.
    """
    with torch.device("meta"):
        block = EncoderLayer(config, 0).eval()
    for module in block.modules() if formulas else ():
        kinds = {nn.Linear: _Linear, nn.LayerNorm: _LayerNorm}
        module.__class__ = kinds.get(type(module), type(module))
    return stacked(block, (0, 0, 1))


_COMPILED: dict[str, Stacked] = {}


def compiled(config: DapeConfig) -> Stacked:
    """Return a compiled block, the same for all tasks and lengths.

    A compiler fuses the steps between the products of matrices. A block holds no parameters, so
    blocks of equal sizes share a compilation. The lengths of the tokens and, without gradients, the
    size of the batch are free.
    """
    sizes = config.to_dict()
    key = str({name: sizes[name] for name in sizes if name not in ("vocab_size", "train_length")})
    if key not in _COMPILED:
        # A compilation for each scheme, with and without gradients.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 1_000)
        _COMPILED[key] = torch.compile(block_of(config, formulas=True), fullgraph=True)
    block = _COMPILED[key]

    def run(
        parameters: dict[str, Tensor], hidden: Tensor, positions: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        free = ((hidden, 2), (positions, 1), (keep, 3))
        for x, axis in free if torch.is_grad_enabled() else (*free, (hidden, 1)):
            if x is not None and x.shape[axis] > 1:
                torch._dynamo.mark_dynamic(x, axis)
        return block(parameters, hidden, positions, keep)

    return run
