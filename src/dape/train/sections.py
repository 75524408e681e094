"""The sections of a recipe: model, training, optimizer, hardware, tracking, pretrained base."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import yaml
from tyro.conf import Suppress
from tyro.constructors import PrimitiveConstructorSpec

from dape.errors import UserError, check_finite, check_whole
from dape.plain_yaml import parse
from dape.strict import Switch, default

DEEPEST = 10_000  # layers


def _mapping(text: str) -> dict[str, Any]:
    """Return the mapping in one-line YAML; a `ValueError` for any other value."""
    try:
        value = parse(text)
    except (ValueError, yaml.YAMLError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is not a YAML mapping such as '{{adapter: {{hidden: 16}}}}'")
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
    """The language model. The corpus and the training length decide all further sizes."""

    scheme: str = "dape-kerple"
    """scheme, such as kerple or dape-alibi; `dape info schemes` lists all"""
    scheme_options: Options = field(default_factory=dict)
    """options of the scheme by place, such as {adapter: {hidden: 32}}"""
    hidden_size: int = 768
    """width of the residual stream"""
    num_hidden_layers: int = 12
    """number of blocks"""
    num_attention_heads: int = 12
    """number of query heads; must divide hidden_size"""
    num_key_value_heads: Annotated[int | None, default("as many as query heads", "INT")] = None
    """number of key and value heads; must divide the number of query heads"""
    block: Literal["paper", "modern"] = "paper"
    """paper (layer norm, GELU, biases) or modern (RMS norm, SwiGLU, no biases)"""
    intermediate_size: Annotated[
        int | None, default("4 x hidden_size, in the modern block 8/3 x", "INT")
    ] = None
    """width of the feed-forward layer"""
    vocab_size: Annotated[int | None, default("size of the tokenizer", "INT")] = None
    """entries of the embedding; 50304 suits tensor cores and the GPT-2 tokenizer"""
    tie_word_embeddings: bool = False
    """share a matrix between input and output embedding"""
    backend: str = "auto"
    """backend of attention; `dape info` lists those that work here"""

    def __post_init__(self) -> None:
        """Refuse impossible sizes."""
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
    """Length and precision of the training."""

    length: int = 512
    """tokens of a sequence"""
    batch_size: int = 256
    """sequences of a step, over all devices and accumulated gradients"""
    steps: int = 50_000
    """number of updates of the weights; 0 saves the model without training"""
    precision: Literal["bf16-mixed", "fp32"] = "bf16-mixed"
    """precision of the layers; weights, gradients, positions and softmax stay float32"""

    def __post_init__(self) -> None:
        """Refuse empty batches."""
        at_least(1, "training", self, "length", "batch_size")
        at_least(0, "training", self, "steps")


@dataclass(frozen=True, slots=True)
class Optimizer:
    """AdamW with linear warm-up and then a schedule."""

    learning_rate: float = 6e-4
    """peak of the learning rate"""
    warmup: float = 0.01
    """fraction of the steps in which the learning rate rises to the peak"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """learning rate after the warm-up: half a cosine down to `final`, or constant"""
    final: float = 0.1
    """learning rate at the last step of the cosine, as a fraction of the peak"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay rates of the first and second moment of AdamW"""
    eps: float = 1e-8
    """number added to the root of the second moment"""
    weight_decay: float = 0.1
    """weight decay of matrices; biases, norms and positions have none"""
    clip_norm: float | None = 1.0
    """largest norm of the whole gradient; None does not clip"""

    def __post_init__(self) -> None:
        """Refuse rates and fractions out of range."""
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
    """The layout of the computation, on which randomised positions and dropout alone depend."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu or cuda; auto takes CUDA if PyTorch sees a GPU"""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """with several devices: ddp copies the weights, fsdp shards them (FSDP2)"""
    gather: Literal["pass", "step"] = "pass"
    """fsdp: exchange weights and gradients at each pass of a block, or once a step"""
    context_parallel: int = 1
    """devices that share a sequence; must divide the number of devices"""
    micro_batch_size: Annotated[int | None, default("the device's whole batch", "INT")] = None
    """sequences that a device computes at a time"""
    compile: Annotated[Literal["none", "blocks", "graphs"], Switch(on="blocks", off="none")] = (
        "none"
    )
    """blocks: torch.compile each block; graphs: also replay both passes as a CUDA graph"""
    activation_checkpointing: Annotated[
        Literal["none", "selective", "blocks"], Switch(on="blocks", off="none")
    ] = "none"
    """blocks: store only the input of a block; selective: also attention and most products"""

    def __post_init__(self) -> None:
        """Refuse an empty micro-batch, and CUDA graphs with sharded gradients or sequences."""
        at_least(1, "hardware", self, "micro_batch_size", "context_parallel")
        if self.compile == "graphs" and self.strategy == "fsdp":
            raise UserError(
                "hardware.compile='graphs' needs hardware.strategy='ddp'; with 'fsdp' take 'blocks'"
            )
        if self.compile == "graphs" and self.context_parallel > 1:
            raise UserError(
                "hardware.compile='graphs' records no exchange within a pass; with"
                " hardware.context_parallel take 'blocks'"
            )


@dataclass(frozen=True, slots=True)
class Tracking:
    """Records of the training, and the steps between records."""

    log_every: int = 10
    """steps between lines of metrics.jsonl and TensorBoard"""
    validate_every: int = 1000
    """steps between validations, always on the same batches"""
    validation_batches: int = 8
    """batches of a validation, of training.batch_size sequences"""
    checkpoint_every: int = 1000
    """steps between checkpoints"""
    keep_checkpoints: int = 2
    """number of checkpoints to keep"""
    service: Literal["none", "trackio", "wandb"] = "none"
    """tracking service for a copy of the metrics"""

    def __post_init__(self) -> None:
        """Refuse intervals below one step."""
        every = ("log_every", "validate_every", "checkpoint_every")
        at_least(1, "tracking", self, *every, "validation_batches", "keep_checkpoints")


@dataclass(frozen=True, slots=True)
class Base:
    """The pretrained model, with adapters and trainable parts."""

    base: Annotated[str, Suppress] = ""
    """folder or hub name of the model: the first argument of the command"""
    adapter: str | None = "dape"
    """adapter in each attention: dape, dape3, talking-heads, ...; None mounts nothing"""
    bias: str | None = "kerple"
    """bias for the adapter: kerple, alibi, fire, ...; None for models with ALiBi"""
    options: Options = field(default_factory=dict)
    """options of adapter and bias, such as {adapter: {hidden: 64}}"""
    train: str = "adapters"
    """trainable parts, as adapters,o_proj: adapters, components of names, or all"""
    config: Options = field(default_factory=dict)
    """keys of the model's configuration to change, such as {scheme: yarn}"""
    backend: str = "auto"
    """backend of attention; `dape info` lists those that work here"""


def at_least(minimum: int, section: str, instance: Any, *names: str) -> None:
    """Raise a `UserError` for numbers of a section below a minimum, or not finite."""
    for name in names:
        value = getattr(instance, name)
        if value is not None:
            check = check_whole if isinstance(value, int) else check_finite
            check(minimum, **{f"{section}.{name}": value})


def _divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        raise UserError(f"{name}={value} is not a multiple of {divisor_name}={divisor}")
