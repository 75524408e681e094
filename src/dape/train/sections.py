"""The sections of a recipe: what is learned, how much, how, on what, and what is written down."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import yaml
from tyro.conf import Suppress
from tyro.constructors import PrimitiveConstructorSpec

from dape.errors import UserError, check_finite, check_whole
from dape.files import parse_yaml
from dape.train.strict import Switch

DEEPEST = 10_000  # layers


def _mapping(text: str) -> dict[str, Any]:
    """Return the mapping that YAML in one line describes; `ValueError` if it is none."""
    try:
        value = parse_yaml(text)
    except (ValueError, yaml.YAMLError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is no YAML mapping such as '{{adapter: {{hidden: 16}}}}'")
    return value


Options = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="YAML",
        instance_from_str=lambda words: _mapping(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [yaml.safe_dump(value, default_flow_style=True).strip()],
    ),
]


@dataclass(frozen=True, slots=True)
class Model:
    """The language model; what is not here follows from the corpus and the training length."""

    scheme: str = "dape-kerple"
    """where position enters, such as kerple or dape-alibi; `dape info` lists them"""
    scheme_options: Options = field(default_factory=dict)
    """options of its parts by place, such as {adapter: {hidden: 32}}"""
    hidden_size: int = 768
    """width of the residual stream"""
    num_hidden_layers: int = 12
    """blocks"""
    num_attention_heads: int = 12
    """query heads; must divide hidden_size"""
    num_key_value_heads: int | None = None
    """key and value heads; must divide the query heads (as many by default)"""
    block: Literal["paper", "modern"] = "paper"
    """layer norm, GELU and biases, or RMS norm, SwiGLU and no biases"""
    intermediate_size: int | None = None
    """width of the feed-forward layer (4 x hidden_size by default, modern 8/3 x)"""
    vocab_size: int | None = None
    """entries of the embedding, if more than the tokenizer has: 50304 suits tensor cores"""
    tie_word_embeddings: bool = False
    """whether input and output embedding are one matrix"""
    backend: str = "auto"
    """how attention is computed; `dape info` says which backends work here"""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be."""
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        at_least(1, "model", self, *sizes, "num_key_value_heads", "intermediate_size")
        if self.num_hidden_layers > DEEPEST:
            raise UserError(
                f"model.num_hidden_layers={self.num_hidden_layers} must be at most {DEEPEST}"
            )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _divides("model.num_attention_heads", heads, "model.hidden_size", self.hidden_size)
        if kv_heads:
            _divides("model.num_key_value_heads", kv_heads, "model.num_attention_heads", heads)


@dataclass(frozen=True, slots=True)
class Training:
    """How much is learned, and in which numbers."""

    length: int = 512
    """tokens per sequence"""
    batch_size: int = 256
    """sequences per step, over all devices and accumulated gradients"""
    steps: int = 50_000
    """updates of the weights"""
    precision: Literal["bf16-mixed", "fp32"] = "bf16-mixed"
    """arithmetic of the layers; weights, gradients, positions and softmax are float32 in both"""

    def __post_init__(self) -> None:
        """Refuse an empty training."""
        at_least(1, "training", self, "length", "batch_size", "steps")


@dataclass(frozen=True, slots=True)
class Optimizer:
    """AdamW with linear warm-up and then a schedule."""

    learning_rate: float = 6e-4
    """peak"""
    warmup: float = 0.01
    """fraction of the steps that rise to the peak"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """after the warm-up: half a cosine down to `final`, or the peak"""
    final: float = 0.1
    """fraction of the peak at the last step of the cosine"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay of the two moments"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.1
    """of matrices; not of biases, norms and positions"""
    clip_norm: float | None = 1.0
    """largest norm of the whole gradient (None: as it comes)"""

    def __post_init__(self) -> None:
        """Refuse rates and fractions outside their range."""
        for name in ("learning_rate", "eps", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"optimizer.{name}={value} must be greater than 0, and finite")
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"optimizer.{name}={getattr(self, name)} is a fraction, from 0 to 1"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas={list(self.betas)} must lie in [0, 1)")
        at_least(0, "optimizer", self, "weight_decay")


@dataclass(frozen=True, slots=True)
class Hardware:
    """How the work is laid out; none of it changes what is learned."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA if there is a GPU"""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """with several devices (`torchrun`): a copy of the weights on each, or a shard (FSDP2)"""
    micro_batch_size: int | None = None
    """sequences a device computes at once (its whole share of the batch by default)"""
    compile: Annotated[Literal["none", "blocks", "graphs"], Switch(on="blocks", off="none")] = (
        "none"
    )
    """blocks: torch.compile each block; graphs: and replay both passes as a CUDA graph"""
    activation_checkpointing: bool = False
    """keep only what enters a block, and compute the rest again in the backward pass"""

    def __post_init__(self) -> None:
        """Refuse an empty micro-batch, and graphs of gradients that no rank has whole."""
        at_least(1, "hardware", self, "micro_batch_size")
        if self.compile == "graphs" and self.strategy == "fsdp":
            raise UserError(
                "hardware.compile='graphs' needs hardware.strategy='ddp'; with 'fsdp' take 'blocks'"
            )


@dataclass(frozen=True, slots=True)
class Tracking:
    """What is written down, and how often in steps."""

    log_every: int = 10
    """a line of metrics.jsonl and TensorBoard"""
    validate_every: int = 1000
    """the loss of the same validation batches"""
    validation_batches: int = 8
    """batches of training.batch_size sequences"""
    checkpoint_every: int = 1000
    """a checkpoint to resume from"""
    keep_checkpoints: int = 2
    """how many of the latest stay"""
    service: Literal["none", "trackio", "wandb"] = "none"
    """where else metrics go"""

    def __post_init__(self) -> None:
        """Refuse intervals below one step."""
        every = ("log_every", "validate_every", "checkpoint_every")
        at_least(1, "tracking", self, *every, "validation_batches", "keep_checkpoints")


@dataclass(frozen=True, slots=True)
class Base:
    """The pretrained model, what is mounted in it, and what of it trains."""

    base: Annotated[str, Suppress] = ""
    """folder or hub name of the model: the first argument of the command"""
    adapter: str | None = "dape"
    """mounted in each attention: dape, dape3, talking-heads, ... (None: the model as it is)"""
    bias: str | None = "kerple"
    """what the adapter sees beside the scores: kerple, alibi, fire, ...; None for scores alone, and
    for models that have ALiBi themselves"""
    options: Options = field(default_factory=dict)
    """options of both, such as {adapter: {hidden: 64}}"""
    train: str = "adapters"
    """what trains, commas between: adapters, components of parameter names (o_proj), or all"""
    config: Options = field(default_factory=dict)
    """keys of the model's configuration to change, such as {scheme: yarn}"""
    backend: str = "auto"
    """how attention is computed; `dape info` says which backends work here"""


def at_least(minimum: int, section: str, instance: Any, *names: str) -> None:
    """Raise a `UserError` for numbers of a section that are less than a minimum, or not finite."""
    for name in names:
        value = getattr(instance, name)
        if value is not None:
            check = check_whole if isinstance(value, int) else check_finite
            check(minimum, **{f"{section}.{name}": value})


def _divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        raise UserError(f"{name}={value} is not a multiple of {divisor_name}={divisor}")
