"""The cost of a recipe: parameters, arithmetic and memory, from its numbers alone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dape.train.optimize import is_positional
from dape.train.recipe import Recipe

# Dense bfloat16 multiply-adds on the tensor cores, in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters of a model: all, those of the position scheme, and those in matrix products."""

    parameters: int
    positional: int
    multiplied: int


def size(model: nn.Module) -> Size:
    """Return the size of a model, which may be on the meta device."""
    named = list(model.named_parameters())
    positional = sum(p.numel() for name, p in named if is_positional(name))
    lookup = model.get_input_embeddings().weight  # type: ignore[operator]
    tied = lookup is model.get_output_embeddings().weight  # type: ignore[operator]
    matrices = sum(p.numel() for name, p in named if p.ndim > 1 and not is_positional(name))
    multiplied = matrices if tied else matrices - lookup.numel()
    return Size(sum(p.numel() for _, p in named), positional, multiplied)


def flops_per_token(model: nn.Module, length: int) -> int:
    r"""Return the arithmetic of training on one token, 6 N + 3 T sum_l (4 C + 2 a_l).

    N are the parameters in matrix products, T the length, C the width: q k^T and the weighted sum
    cost 2 C each per pair of tokens, and an adapter two for each of its a weights. The backward
    pass costs twice the forward. As in PaLM (Chowdhery et al., 2022, appendix B) all pairs count,
    also those the causal mask hides, and recomputation does not.
    """
    config: Any = model.config
    mixing = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if "adapter" in name.split(".") and weight.ndim > 1
    )
    pairs = 4 * config.hidden_size * config.num_hidden_layers + 2 * mixing
    return 6 * size(model).multiplied + 3 * length * pairs


def peak_flops(device: torch.device) -> float | None:
    """Return the bfloat16 peak of a GPU, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for chip, peak in PEAK_FLOPS.items() if chip in name), None)


def memory(recipe: Recipe, parameters: int, vocab_size: int, ranks: int) -> dict[str, float]:
    """Return GiB on each device, by what takes it; the attention's own workspace is not counted.

    Weights, gradients and two moments are float32, 16 bytes a parameter. A block keeps about 34 C
    bytes a token in mixed precision (Korthikanti et al., 2022, eq. 2, without the score matrices),
    or its input alone with checkpointing; logits count thrice in float32 and once as computed.
    For the 125M recipe that is 17.9, of which PyTorch 2.11 took 17.0 on an H200.
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
        "logits": tokens * vocab_size * (12 + 2 * wide) / GIB,
    }
