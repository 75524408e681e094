"""The optimizer: parameter groups and the schedule of the learning rate."""

import math

import torch
from torch import nn

from dape.train.sections import Optimizer

# Names of the modules of the four places in the model.
PLACES = frozenset({"position_embedding", "rotation", "position_bias", "adapter"})


def learning_rate(step: int, steps: int, settings: Optimizer) -> float:
    r"""Return the rate of update `step` = 1 .. `steps`: a linear warm-up, then the schedule.

    With W = `warmup` * `steps` updates of warm-up and the peak r: r step / W up to W, then r for
    the constant schedule, or r (final + (1 - final) (1 + cos(pi (step - W) / (steps - W))) / 2).
    """
    warmup = round(settings.warmup * steps)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    cosine = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    return settings.learning_rate * (settings.final + (1 - settings.final) * cosine)


def is_positional(name: str) -> bool:
    """Return whether the parameter of this name belongs to the position scheme."""
    return not PLACES.isdisjoint(name.split("."))


def adamw(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """Return AdamW with weight decay for matrices.

    Biases, norms and parameters of the position scheme have no decay. Frozen parameters are left
    out.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and not is_positional(name)
        if parameter.requires_grad:
            (decayed if matrix else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],  # a checkpoint loses an empty group
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=next(model.parameters()).device.type == "cuda",
    )
