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


@pytest.mark.parametrize(
    ("positions", "refusal"),
    [
        (torch.arange(4), None),
        (torch.arange(8).view(2, 4), None),
        (torch.arange(4).float(), None),
        (torch.arange(1), r"\[1\] must be \[4\] or \[1 or 2, 4\]"),
        (torch.arange(5), r"\[5\] must be"),
        (torch.arange(12).view(3, 4), r"\[3, 4\] must be"),
        (torch.arange(4).bfloat16(), r"\[4\] are torch.bfloat16; positions are whole numbers"),
        (torch.arange(4) > 1, r"\[4\] are torch.bool"),
        (4, "is a int; give a torch.Tensor"),
    ],
)
@pytest.mark.parametrize("name", ["rope", "xpos", "sinusoidal"])
def test_positions_outside_attention_are_those_of_the_tokens(name, positions, refusal):
    """A single position would turn all tokens alike, and bfloat16 rounds positions above 256."""
    x, tokens = torch.ones(2, 3, 4, 8), torch.ones(2, 4, 8)
    calls = {
        "rope": lambda: dape.RoPE(8)(x, x, positions),
        "xpos": lambda: dape.XPos(8)(x, x, positions),
        "sinusoidal": lambda: dape.Sinusoidal(8)(tokens, positions),
    }
    if refusal is None:
        calls[name]()
        return
    with pytest.raises(UserError, match=f"^positions.* {refusal}"):
        calls[name]()


@pytest.mark.parametrize("name", ["ALiBi", "Kerple", "Sandwich", "FIRE", "T5"])
def test_a_bias_takes_no_positions_that_round(name):
    bias, positions = getattr(dape, name)(2), torch.arange(4)
    for given in ((positions.bfloat16(), positions), (positions, positions.half())):
        with pytest.raises(UserError, match=r"16; positions are whole numbers of torch.int64$"):
            bias(*given)


@pytest.mark.parametrize("rotation", [dape.RoPE(8), dape.XPos(8)])
def test_a_rotation_turns_heads_of_its_width_and_each_token_by_a_position(rotation):
    x, positions = torch.ones(2, 3, 4, 8), torch.arange(4)
    for query, message in (
        (x[0], r"the query \[3, 4, 8\] must be"),
        (torch.ones(2, 3, 4, 12), r"the query \[2, 3, 4, 12\] must be .* with head_dim=8$"),
        (x[:, :, :1], r"positions of the query \[4\] must be \[1\]"),
    ):
        with pytest.raises(UserError, match=message):
            rotation(query, x, positions)


def test_a_residual_is_there_or_not():
    with pytest.raises(UserError, match="residual='no' must be True or False"):
        dape.DAPE(2, residual="no")


def test_a_backend_is_known_when_a_configuration_is_made():
    with pytest.raises(UserError, match="unknown backend 'foo'"):
        dape.DapeConfig(backend="foo")
    assert dape.DapeConfig(backend="cuda").backend == "cuda", "it may run elsewhere"
