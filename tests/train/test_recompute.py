"""What of a block is computed twice."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dape import DapeConfig, DapeForCausalLM
from dape.train.recompute import recomputed


class Counting(TorchDispatchMode):
    """Counts attentions and the products of linear layers with biases."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.name().removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def passes(kept):
    """Return the gradients of a block, and how often a pass calls what."""
    torch.manual_seed(0)
    config = DapeConfig(
        scheme="nope", vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    block = DapeForCausalLM(config).model.layers[0]
    hidden = torch.randn(2, 6, 16, requires_grad=True)
    if kept != "none":
        block.forward = recomputed(block.forward, kept)
    with Counting() as counting:
        block(hidden, causal=True).square().sum().backward()
    attentions = counting.calls["_scaled_dot_product_flash_attention_for_cpu"]
    gradients = [hidden.grad, *(parameter.grad for parameter in block.parameters())]
    return gradients, attentions, counting.calls["addmm"]


@pytest.mark.parametrize(
    ("kept", "attentions", "products"),
    [
        ("none", 1, 6),
        ("selective", 1, 7),  # the product with more outputs than inputs again
        ("blocks", 2, 11),  # all but the last, whose output no gradient needs
    ],
)
def test_what_is_dear_is_computed_once(kept, attentions, products):
    gradients, *calls = passes(kept)
    assert calls == [attentions, products]
    for found, right in zip(gradients, passes("none")[0], strict=True):
        assert torch.equal(found, right)
