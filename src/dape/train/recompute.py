"""Activation checkpointing: activations of a block kept for the backward pass, or computed again.

The policy is PyTorch's selective checkpointing. Checkpoints lie inside compiled code, visible to
the compiler.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dape.positions import turn

# Matrix products, by the index of their left factor.
_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}


def recomputed(forward: Callable[..., Tensor], kept: str) -> Callable[..., Tensor]:
    """Return a block's forward pass that keeps the input, and costly outputs if `selective`."""
    selective = partial(create_selective_checkpoint_contexts, _policy)
    context: dict[str, Any] = {"context_fn": selective} if kept == "selective" else {}

    @wraps(forward)
    def run(*arguments: Any, **named: Any) -> Tensor:
        found: Tensor = checkpoint(forward, *arguments, use_reentrant=False, **context, **named)
        return found

    return run


def _policy(_context: Any, operator: Any, *arguments: Any, **_named: Any) -> CheckpointPolicy:
    """Keep outputs of attention, and of products no wider than their input.

    The wide product, into the hidden units of the feed-forward layer, takes four times the memory
    of a narrow product, and two ninths of a block's arithmetic.
    """
    attends = operator.namespace == "dape" and operator is not turn.operator
    keep = attends or "scaled_dot_product" in operator.name()
    if operator in _PRODUCTS:
        left, right = arguments[_PRODUCTS[operator] :][:2]
        keep = right.shape[1] <= left.shape[1]
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
