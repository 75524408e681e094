"""Small models whose weights are far from their start, so that every part matters."""

import torch

from dape.model.configuration import DapeConfig
from dape.model.modeling import DapeForCausalLM

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "train_length": 64,
}


def fresh(**config):
    """Return a model as it starts, in evaluation mode."""
    return DapeForCausalLM(DapeConfig(**{**SIZES, **config})).eval()


def grown(**config):
    """Return a float64 model each of whose parameters has moved."""
    model = fresh(**config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def tokens(*shape):
    """Return ids of no special token."""
    return torch.randint(1, SIZES["vocab_size"], shape)
