"""Sizes and numbers that mean nothing, given to the classes themselves."""

import math

import pytest
import torch

import dape
from dape.errors import UserError

# The hook that checks types would refuse some of them first.
pytestmark = pytest.mark.unhooked
NO_SIZES = [0, -1, 1.5, True, "2", 2**70, math.nan, None]
NO_NUMBERS = [math.nan, math.inf, "1", True]


@pytest.mark.parametrize("value", NO_SIZES)
@pytest.mark.parametrize(
    "name", ["ALiBi", "DAPE", "FIRE", "Kerple", "KerplePower", "NoBias", "Sandwich", "T5"]
)
def test_heads_are_counted(name, value):
    with pytest.raises(UserError, match="num_heads="):
        getattr(dape, name)(num_heads=value)


@pytest.mark.parametrize("value", NO_SIZES)
@pytest.mark.parametrize(
    ("name", "option"),
    [
        *(("DAPE", "hidden"), ("DAPE", "kernel_size"), ("T5", "num_buckets")),
        *(("T5", "max_distance"), ("Sandwich", "d_bar"), ("FIRE", "hidden")),
        ("FIRE", "train_length"),
    ],
)
def test_sizes_are_whole(name, option, value):
    with pytest.raises(UserError, match=f"{option}="):
        getattr(dape, name)(2, **{option: value})


@pytest.mark.parametrize("value", NO_SIZES)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *(
            ("RoPE", ["head_dim"]),
            ("CoPE", ["head_dim", "npos_max"]),
            ("TalkingHeads", ["num_heads"]),
        ),
        *(("Sinusoidal", ["hidden_size"]), ("Learned", ["train_length", "hidden_size"])),
        ("TransformerXL", ["num_heads", "head_dim", "hidden_size"]),
        *((name, ["head_dim", "train_length"]) for name in ("DynamicNTK", "YaRN", "Llama3")),
        ("RandomizedRoPE", ["head_dim", "train_length", "pool"]),
    ],
)
def test_every_size_is_whole(name, sizes, value):
    for wrong in sizes:
        if (wrong, value) == ("pool", None):  # the default
            continue
        with pytest.raises(UserError, match=f"{wrong}="):
            getattr(dape, name)(**{**dict.fromkeys(sizes, 8), wrong: value})


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize(
    ("name", "option"),
    [
        *(("YaRN", "factor"), ("YaRN", "beta_fast"), ("YaRN", "beta_slow")),
        *(("YaRN", "attention_factor"), ("DynamicNTK", "factor"), ("Llama3", "factor")),
        *(("Llama3", "low_freq_factor"), ("Llama3", "high_freq_factor")),
    ],
)
def test_numbers_beside_a_training_length_are_finite(name, option, value):
    with pytest.raises(UserError, match=f"{option}="):
        getattr(dape, name)(8, 64, **{option: value})


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize(
    ("name", "option"),
    [
        *(("RoPE", "base"), ("RoPE", "fraction"), ("PositionInterpolation", "factor")),
        *(("NTK", "factor"), ("XPos", "scale_base"), ("FIRE", "threshold")),
        *(("Sinusoidal", "base"), ("Sinusoidal", "token_scale")),
    ],
)
def test_numbers_are_finite(name, option, value):
    with pytest.raises(UserError, match=f"{option}="):
        getattr(dape, name)(8, **{option: value})


@pytest.mark.parametrize(
    "wrong",
    [{"scale": each} for each in NO_NUMBERS]
    + [{"query_offset": each} for each in (1.5, math.nan, 2**70, True, None, torch.tensor(1.5))]
    + [{"key_offset": each} for each in (1.5, None, 2**70)]
    + [{"causal": each} for each in ("no", 1, None)],
)
def test_attention_takes_no_nonsense(wrong):
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UserError, match=f"{next(iter(wrong))}"):
        dape.attention(q, q, q, **wrong)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64, torch.uint64])
@pytest.mark.parametrize("name", ["query_positions", "key_positions"])
def test_positions_are_no_mask_and_nothing_that_rounds_them(name, dtype):
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UserError, match=rf"{name} \[4\] are {dtype}; positions are whole numbers"):
        dape.attention(q, q, q, dape.ALiBi(2), **{name: torch.arange(4).to(dtype)})


def test_a_residual_is_there_or_not():
    with pytest.raises(UserError, match="residual='no' must be True or False"):
        dape.DAPE(2, residual="no")


def test_a_backend_is_known_when_a_configuration_is_made():
    with pytest.raises(UserError, match="unknown backend 'foo'"):
        dape.DapeConfig(backend="foo")
    assert dape.DapeConfig(backend="cuda").backend == "cuda", "it may run elsewhere"
