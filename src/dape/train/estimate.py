"""The cost of a recipe: parameters, arithmetic and memory, computed without training."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dape.positions.adapter import CoPE, TransformerXL
from dape.train.optimize import is_positional
from dape.train.recipe import Recipe

# Dense bfloat16 multiply-adds on the tensor cores, in FLOP/s, from the makers' data sheets. The
# first key within the name of a GPU counts.
PEAK_FLOPS: dict[str, float | None] = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090 Laptop": None,  # a smaller chip, as that of the next line
    "RTX 4090 D": None,
    "RTX 4090": 165e12,
}
GIB = 2**30
# Tokens whose logits are held at a time, with gradients 20 GB at 50,000 entries.
TOKENS_AT_ONCE = 2**15
# Folder and file of the limits of control groups, in versions 2 and 1.
_GROUPS = {
    "": ("/sys/fs/cgroup", "memory.max"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
}


@dataclass(frozen=True, slots=True)
class Size:
    """Number of parameters of a model: in total, in the position scheme, in matrix products.

    `frozen` counts the parameters in matrix products without a gradient.
    """

    parameters: int
    positional: int
    multiplied: int
    frozen: int


def size(model: nn.Module) -> Size:
    """Return the size of a model, also of a model on the meta device."""
    named = list(model.named_parameters())
    positional = sum(p.numel() for name, p in named if is_positional(name))
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    lookups = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    matrices = [p for name, p in named if p.ndim > 1 and not is_positional(name)]
    products = [p for p in matrices if p is head or id(p) not in lookups]
    multiplied = sum(p.numel() for p in products)
    frozen = sum(p.numel() for p in products if not p.requires_grad)
    return Size(sum(p.numel() for _, p in named), positional, multiplied, frozen)


def is_counted(model: nn.Module) -> bool:
    """Return whether `flops_per_token` knows the products of a model.

    A mixture of experts multiplies a token by few of its matrices. Models of several parts, latent
    keys (MLA) and heads of different widths have other products.
    """
    config: Any = model.config
    try:
        _width_of_heads(config)
    except (AttributeError, RuntimeError):
        return False
    experts = any("expert" in name for name, _ in model.named_parameters())
    return not experts and not hasattr(config, "kv_lora_rank")


def flops_per_token(model: nn.Module, length: int) -> int:
    r"""Return the FLOP of training on a token, 6 (N + sum b) - 2 F + T sum (12 C + 6 a - 2 w).

    N is the number of parameters in matrix products, F the number of those frozen, whose own
    gradient is not computed, T the length and C the width of all heads. Sums are over layers. An
    adapter multiplies b times for a token and a times for a pair of tokens, of which w are with
    constants, which have no gradient. Per pair, q k^T and the weighted sum cost 2 C each. Otherwise
    the backward pass costs twice the forward pass. As in PaLM (Chowdhery et al., 2022, appendix B),
    masked pairs count and recomputation does not.
    """
    config: Any = model.config
    width = _width_of_heads(config)
    adapters = [
        _products(module, width)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "adapter"
    ]
    by_token, by_pair, constant = (sum(each) for each in zip((0, 0, 0), *adapters, strict=True))
    pairs = 12 * width * config.num_hidden_layers + 6 * by_pair - 2 * constant
    numbers = size(model)
    return 6 * (numbers.multiplied + by_token) - 2 * numbers.frozen + length * pairs


def _width_of_heads(config: Any) -> int:
    """Return heads times head_dim, which may be another width than that of the model."""
    heads = config.num_attention_heads
    width: int = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return width


def _products(adapter: nn.Module, width: int) -> tuple[int, int, int]:
    """Return an adapter's multiplications for a token, for a pair, and for a pair by constants."""
    if isinstance(adapter, CoPE):
        return len(adapter.weight) * width, 0, 0
    if isinstance(adapter, TransformerXL):
        sinusoids = adapter.num_heads * adapter.weight.shape[2]
        return adapter.weight.numel() + adapter.u.numel(), sinusoids, sinusoids
    return 0, sum(weight.numel() for weight in adapter.parameters() if weight.ndim > 1), 0


def peak_flops(device: torch.device) -> float | None:
    """Return the bfloat16 peak of a GPU in FLOP/s, or None for an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for chip, peak in PEAK_FLOPS.items() if chip in name), None)


def memory_of(device: torch.device) -> int:
    """Return the memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_group_limits()])


def _group_limits() -> Iterator[int]:
    """Yield the limits of this process's control groups, at which Linux kills without a word."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kind, group = line.split(":", 2)
            root, name = _GROUPS.get(kind, ("/", ""))
            place = Path(root, group.lstrip("/"))
            for folder in (place, *place.parents):
                with suppress(OSError, ValueError):  # no such file, or no limit
                    yield int((folder / name).read_text())


def memory(recipe: Recipe, parameters: int, vocab_size: int, ranks: int) -> dict[str, float]:
    """Return the memory of a device in GiB, by use, without the workspace of attention.

    Weights, gradients and two moments are float32, 16 bytes a parameter. A block keeps about 34 C
    bytes a token in mixed precision (Korthikanti et al., 2022, eq. 2, without the score matrices),
    or only the input of C values with checkpointing. Logits, of `TOKENS_AT_ONCE` tokens at most,
    count three times in float32 and once in the dtype of the computation. The estimate for the 125M
    recipe is 17.9 GiB, and PyTorch 2.11 took 17.0 GiB on an H200.
    """
    width, layers = recipe.model.hidden_size, recipe.model.num_hidden_layers
    wide = 2 if recipe.training.precision == "fp32" else 1
    context = recipe.hardware.context_parallel
    share = recipe.training.batch_size * context // ranks
    tokens = (recipe.hardware.micro_batch_size or share) * recipe.training.length // context
    block = 34 * wide * width
    kept = {
        "none": layers * block,
        "selective": block + layers * (4 + 6 * 2 * wide) * width,
        "blocks": block + layers * 4 * width,
    }[recipe.hardware.activation_checkpointing]
    shards = ranks if recipe.hardware.strategy == "fsdp" else 1
    whole = 6 if shards > 1 and recipe.hardware.gather == "step" else 0
    return {
        "weights, gradients, moments": (16 / shards + whole) * parameters / GIB,
        "activations": tokens * kept / GIB,
        "logits": min(tokens, TOKENS_AT_ONCE) * vocab_size * (12 + 2 * wide) / GIB,
    }
