"""The encoder of the benchmark: the Transformer of Deletang et al. (2023), with any scheme.

- post-norm blocks: attention without biases, a ReLU layer four times as wide, layer norms
- the input, then a placeholder per output symbol, in a single pass with answers at the placeholders
- every token sees all tokens; a bias depends on the distance |i - j| alone, equal on both sides
- dropout where a block adds to the stream, and after an additive position embedding
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from dape.chomsky.task import Task
from dape.errors import UserError
from dape.positions import scheme as schemes
from dape.positions.absolute import Sinusoidal
from dape.positions.adapter import DAPE
from dape.positions.rotary import RandomizedRoPE

if TYPE_CHECKING:
    from dape.model.configuration import DapeConfig


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of the encoder."""

    hidden_size: int = 64
    """width of the residual stream: 64 in Deletang et al., 256 in the DAPE paper"""
    num_hidden_layers: int = 5
    """number of blocks"""
    num_attention_heads: int = 8
    """number of heads; must divide hidden_size"""
    adapter_hidden: int = 64
    """number of hidden units of DAPE"""
    pool: int = 2048
    """number of positions to draw randomised positions from"""


def configure(
    model: Model, scheme: str, task: Task, length: int, backend: str = "auto"
) -> "DapeConfig":
    """Return the configuration for a task with training inputs of up to `length` symbols.

    Models trained together need the backend `reference`.

    Raises:
        UserError: for an unknown scheme, or sizes not divisible by the number of heads.
    """
    from dape.model.configuration import DapeConfig

    parts = schemes.resolve(scheme)
    options: dict[str, dict[str, Any]] = {}
    if parts.adapter is not None and parts.adapter.module is DAPE:
        options["adapter"] = {"hidden": model.adapter_hidden}
    if parts.rotation is not None and parts.rotation.module is RandomizedRoPE:
        options["rotation"] = {"pool": model.pool}
    if parts.embedding is not None and parts.embedding.module is Sinusoidal:
        options["embedding"] = {"token_scale": 1.0}  # the encoder scales for every scheme
    return DapeConfig(
        vocab_size=len(task.inputs) + 1,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        block="modern",  # for attention without biases
        intermediate_size=4 * model.hidden_size,
        scheme=scheme,
        scheme_options=options,
        train_length=task.tokens(length),
        causal=False,
        backend=backend,
        use_cache=False,
    )


class Noise(NamedTuple):
    """The draws of a forward pass: factors of dropout, and randomised positions by layer.

    Noise is an argument, and models trained together draw as in separate trainings.
    """

    keep: Float[Tensor, "places batch length width"] | None = None
    positions: Int[Tensor, "layers length"] | None = None

    def one(self, index: int) -> "Noise":
        """Return the noise of a generator, from noise with a leading axis of generators."""
        keep, positions = (None if part is None else part[index] for part in self)
        return Noise(keep, positions)

    def layer(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the positions of a layer, and the factors of its two places of dropout."""
        keep, positions = self
        return (
            None if positions is None else positions[index],
            None if keep is None else keep[2 * index : 2 * index + 2],
        )


QUIET = Noise()


class EncoderLayer(nn.Module):
    """A post-norm block: `LN(x + attention(x))`, then `LN(x + W2 relu(W1 x))`."""

    def __init__(self, config: "DapeConfig", layer_idx: int) -> None:
        from dape.model.blocks import DapeAttention

        super().__init__()
        width, wide = config.hidden_size, config.feed_forward_size
        self.self_attn = DapeAttention(config, layer_idx)
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.feed_forward = nn.Sequential(nn.Linear(width, wide), nn.ReLU(), nn.Linear(wide, width))
        self.feed_forward_norm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(
        self,
        hidden: Float[Tensor, "batch length width"],
        positions: Int[Tensor, " length"] | None,
        keep: Float[Tensor, "2 batch length width"] | None,
    ) -> Float[Tensor, "batch length width"]:
        """Return the hidden states after the block."""
        mixed, _ = self.self_attn(hidden, query_positions=positions, key_positions=positions)
        hidden = self.attention_norm(hidden + drop(mixed, keep, 0))
        return self.feed_forward_norm(hidden + drop(self.feed_forward(hidden), keep, 1))


class Encoder(nn.Module):
    """The encoder, from the ids of an input to the logits of the output positions."""

    def __init__(self, config: "DapeConfig", classes: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Linear(config.vocab_size, config.hidden_size, bias=False)
        self.position_embedding = schemes.resolve(config.scheme).build(
            "embedding", config.dimensions, config.scheme_options
        )
        self.layers = nn.ModuleList(
            EncoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.head = nn.Linear(config.hidden_size, classes)
        self.apply(_initialize)
        truncated_normal(self.embed_tokens.weight, 0.02)

    def forward(
        self, inputs: Int[Tensor, "batch length"], out: int, noise: Noise = QUIET
    ) -> Float[Tensor, "batch out classes"]:
        """Return the logits of `out` output symbols."""
        hidden = self.embed(inputs, out, noise.keep)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, *noise.layer(index))
        return self.read(hidden, out)

    def embed(
        self,
        inputs: Int[Tensor, "batch length"],
        out: int,
        keep: Float[Tensor, "places batch tokens width"] | None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the hidden states before the blocks, of the input and the placeholders."""
        placeholder = self.config.vocab_size - 1
        tokens = pad(inputs, (0, out), value=placeholder)
        one_hot = tokens[..., None] == torch.arange(placeholder + 1, device=tokens.device)
        hidden = self.embed_tokens(one_hot.to(self.head.weight.dtype))
        hidden = hidden * math.sqrt(self.config.hidden_size)
        if self.position_embedding is None:
            return hidden
        indices = torch.arange(tokens.shape[1], device=tokens.device)
        return drop(self.position_embedding(hidden, indices), keep, -1)

    def read(
        self, hidden: Float[Tensor, "batch tokens width"], out: int
    ) -> Float[Tensor, "batch out classes"]:
        """Return the logits of the placeholders, from the hidden states after the blocks."""
        return self.head(hidden[:, -out:])

    def train(self, mode: bool = True) -> "Encoder":
        """Set the mode of all modules except rotations; random positions come as `Noise`."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, RandomizedRoPE):
                module.training = False
        return self

    def noise(
        self,
        generators: Sequence[torch.Generator],
        batch: int,
        length: int,
        dropout: float = 0.0,
    ) -> Noise:
        """Return the noise of a pass over `length` tokens, with a leading axis of generators.

        Randomised positions are drawn without replacement and sorted. Every layer draws anew, and
        the batch shares the draw. As in the authors' code, tests draw positions too.

        Raises:
            UserError: for more tokens than positions.
        """
        config, device = self.config, generators[0].device
        places = 2 * config.num_hidden_layers + (self.position_embedding is not None)
        keep = positions = None
        if dropout:
            keep = torch.empty(
                len(generators), places, batch, length, config.hidden_size, device=device
            )
            for own, generator in zip(keep, generators, strict=True):
                own.bernoulli_(1 - dropout, generator=generator)
            keep /= 1 - dropout
        rotation = next((m for m in self.modules() if isinstance(m, RandomizedRoPE)), None)
        if rotation is not None:
            if length > rotation.pool:
                raise UserError(
                    f"model.pool={rotation.pool} has fewer positions than the {length} tokens of "
                    "input and output; raise model.pool"
                )
            shape = (config.num_hidden_layers, rotation.pool)
            ranks = [torch.rand(shape, generator=each, device=device) for each in generators]
            positions = torch.stack(ranks).topk(length).indices.sort().values
        return Noise(keep, positions)


def drop(
    x: Float[Tensor, "batch length width"],
    keep: Float[Tensor, "places batch length width"] | None,
    place: int,
) -> Float[Tensor, "batch length width"]:
    """Return x times the factors of dropout at a place, if any."""
    return x if keep is None else x * keep[place]


def truncated_normal(weight: Tensor, deviation: float) -> None:
    """Draw from a normal distribution cut at two deviations, as Haiku does."""
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def _initialize(module: nn.Module) -> None:
    """Draw matrices with deviation 1 / sqrt(fan in), and set biases to 0, outside the scheme."""
    if isinstance(module, nn.Linear):
        truncated_normal(module.weight, 1 / math.sqrt(module.in_features))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build(config: "DapeConfig", classes: int, seed: int) -> Encoder:
    """Return a new encoder with parameters drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(config, classes)
