"""Calls of attention that are computed on one rank, and spread over two."""

import math

import torch

from dape.positions.bias import FIRE
from dape.positions.scheme import resolve

HEADS, WIDTH, LENGTH = 2, 8, 20
SIZES = {"num_heads": HEADS, "head_dim": WIDTH, "hidden_size": 16, "train_length": 6}
EXACT = ("nope", "t5", "dape-kerple", "dape-fire", "dape3-kerple", "cope", "transformer-xl")
CALLS = {
    **{name: ("chunked", torch.float64) for name in EXACT},
    **{f"{name} fused": ("triton", torch.float32) for name in ("kerple", "dape-fire")},
    "dape3-kerple fused": ("triton", torch.float32),
}


def arguments(name):
    """Return query, key, value and the gradient of the output, bias, adapter and backend."""
    backend, dtype = CALLS[name]
    torch.manual_seed(3)
    scheme = resolve(name.split()[0])
    bias, adapter = (
        module and module.to(dtype)
        for module in (scheme.build(place, SIZES, {}) for place in ("bias", "adapter"))
    )
    if isinstance(bias, FIRE):  # between two tokens: at one of them a maximum has two gradients
        torch.nn.init.constant_(bias.log_threshold, math.log(6.5))
    whole = [torch.randn(2, HEADS, LENGTH, WIDTH, dtype=dtype) for _ in range(4)]
    return whole, bias, adapter, backend
