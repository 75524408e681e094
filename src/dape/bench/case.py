"""The measured case: sizes, modules and random inputs, all from a seed."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dape.errors import UserError
from dape.positions.scheme import resolve

# Heads and head_dim of the recipes.
SHAPES = {"125m": (12, 64), "350m": (16, 64), "2.7b": (32, 80), "6.7b": (32, 128)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRAIN_LENGTH = 512
# Query, key and value to the output.
Attend = Callable[..., Tensor]
FORWARD, TRAINING = "forward", "forward + backward"
DIRECTIONS = (FORWARD, TRAINING)
YARDSTICK = "sdpa"  # the divisor of ratios


@dataclass(frozen=True, slots=True)
class Case:
    """A problem: causal attention over `batch` sequences of `length` tokens under a scheme."""

    scheme: str
    heads: int
    head_dim: int
    length: int
    batch: int
    dtype: str
    device: torch.device
    seed: int

    @property
    def scores(self) -> int:
        """Return the number of entries in the score matrices of all heads."""
        return self.batch * self.heads * self.length**2

    def at_most(self, scores: int) -> "Case":
        """Return the case with a limited number of scores, by halving the batch, then the length.

        At least a sequence of two tokens remains.
        """
        case = self
        while case.batch > 1 and case.scores > scores:
            case = replace(case, batch=case.batch // 2)
        while case.length > 2 and case.scores > scores:
            case = replace(case, length=case.length // 2)
        return case


def shape(name: str) -> tuple[int, int]:
    """Return heads and head_dim of a recipe, `125m`, or of `12x64`.

    Raises:
        UserError: for any other name.
    """
    if name in SHAPES:
        return SHAPES[name]
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if found is None:
        raise UserError(
            f"shape {name!r} is neither one of {', '.join(SHAPES)} nor heads x head_dim as 12x64"
        )
    return int(found[1]), int(found[2])


class Parts(NamedTuple):
    """Bias and adapter of a scheme; embeddings and rotations are outside attention."""

    bias: nn.Module | None = None
    adapter: nn.Module | None = None

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters as `bias.raw_p`."""
        return {
            f"{place}.{name}": parameter
            for place, module in self._asdict().items()
            if module is not None
            for name, parameter in module.named_parameters()
        }


def build(case: Case) -> Parts:
    """Return the modules of the case's scheme, in float32.

    Parameters that start at zero are drawn from N(0, 0.1), because zeros would hide errors.
    """
    dimensions = {
        "num_heads": case.heads,
        "head_dim": case.head_dim,
        "hidden_size": case.heads * case.head_dim,
        "train_length": TRAIN_LENGTH,
    }
    scheme = resolve(case.scheme)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        parts = Parts(*(scheme.build(place, dimensions, {}) for place in Parts._fields))
        for parameter in parts.named_parameters.values():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return Parts(*(module and module.to(case.device) for module in parts))


class Inputs(NamedTuple):
    """Query, key and value with gradients, and the gradient of the output."""

    query: Float[Tensor, "batch heads length head_dim"]
    key: Float[Tensor, "batch heads length head_dim"]
    value: Float[Tensor, "batch heads length head_dim"]
    cotangent: Float[Tensor, "batch heads length head_dim"]


def draw(case: Case, count: int) -> list[Inputs]:
    """Return `count` sets of inputs from N(0, 1)."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    size = (case.batch, case.heads, case.length, case.head_dim)

    def tensor() -> Tensor:
        dtype = DTYPES[case.dtype]
        return torch.randn(size, generator=generator, device=case.device, dtype=dtype)

    def leaf() -> Tensor:
        return tensor().requires_grad_()

    return [Inputs(leaf(), leaf(), leaf(), tensor()) for _ in range(count)]


def step(attend: Attend, inputs: Inputs, parts: Parts, direction: str) -> list[Tensor]:
    """Return the output and, in training, the gradients of q, k, v and every parameter."""
    *qkv, cotangent = inputs
    if direction == FORWARD:
        with torch.no_grad():
            return [attend(*qkv)]
    out = attend(*qkv)
    leaves = [*qkv, *parts.named_parameters.values()]
    return [out, *torch.autograd.grad(out, leaves, cotangent)]


def sets(case: Case) -> int:
    """Return the number of input sets to rotate over, twice the size of the GPU's cache."""
    if case.device.type != "cuda":
        return 2
    entries = case.batch * case.heads * case.length * case.head_dim
    size = len(Inputs._fields) * entries * DTYPES[case.dtype].itemsize
    cache = torch.cuda.get_device_properties(case.device).L2_cache_size
    return max(2, min(8, math.ceil(2 * cache / size)))
