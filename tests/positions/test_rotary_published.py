"""Rotations against published implementations."""

import pytest
import torch
from torch.testing import assert_close
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.llama import modeling_llama as llama
from turns import LENGTH, draw

from dape.positions.rotary import (
    NTK,
    DynamicNTK,
    Llama3,
    PositionInterpolation,
    RandomizedRoPE,
    RoPE,
    XPos,
    YaRN,
)


def config(head_dim=16, length=LENGTH, **parameters):
    return LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=length,
        rope_parameters={"rope_theta": 10000.0, **parameters},
    )


def inverse_frequencies(kind, seq_len=None, head_dim=16, **parameters):
    """Return what transformers computes, and its factor of cosine and sine."""
    settings = config(head_dim, rope_type=kind, **parameters)
    return ROPE_INIT_FUNCTIONS[kind](settings, "cpu", seq_len=seq_len)


@pytest.mark.parametrize(
    ("rotation", "parameters"),
    [
        (RoPE(16), {"rope_type": "default"}),
        (RoPE(16, base=500.0), {"rope_type": "default", "rope_theta": 500.0}),
        (PositionInterpolation(16, factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            YaRN(16, LENGTH, factor=8.0),
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": LENGTH},
        ),
    ],
    ids=["rope", "base", "pi", "yarn"],
)
def test_queries_and_keys_are_those_of_llama(rotation, parameters):
    (query, key), positions = draw(100), torch.arange(100)
    waves = llama.LlamaRotaryEmbedding(config(**parameters))(query, positions[None])
    expected = llama.apply_rotary_pos_emb(query, key, *waves)
    for ours, theirs in zip(rotation(query, key, positions), expected, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_quarter_turns_as_in_gpt_neox():
    (query, key), positions = draw(50, head_dim=32), torch.arange(50)
    waves = neox.GPTNeoXRotaryEmbedding(GPTNeoXConfig(hidden_size=64, num_attention_heads=2))(
        query, positions[None]
    )
    assert waves[0].shape[-1] == 8
    ours = RoPE(32, fraction=0.25)(query, key, positions)
    for mine, theirs in zip(ours, neox.apply_rotary_pos_emb(query, key, *waves), strict=True):
        assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert torch.equal(ours[0][..., 8:], query[..., 8:])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factor": 4.0},
        {"factor": 16.0, "beta_fast": 4.0, "beta_slow": 0.5},
        {"factor": 2.0, "attention_factor": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("head_dim", "length"), [(64, 512), (128, 4096), (8, 64), (8, 2**17), (8, 2**30)]
)
def test_yarn_s_frequencies_and_temperature_are_those_of_transformers(head_dim, length, options):
    ours = YaRN(head_dim, length, **options)
    theirs, factor = inverse_frequencies(
        "yarn",
        head_dim=head_dim,
        **{"factor": 16.0, "original_max_position_embeddings": length, **options},
    )
    assert_close(ours.frequencies(torch.arange(3), torch.float32), theirs, rtol=1e-6, atol=0)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"factor": 8.0},
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"factor": 2.0, "low_freq_factor": 0.3, "high_freq_factor": 20.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("head_dim", "length"), [(64, 512), (128, 8192), (8, 64), (8, 2**17)])
def test_llama3_s_frequencies_are_those_of_transformers(head_dim, length, options):
    named = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **options}
    theirs, factor = inverse_frequencies(
        "llama3", head_dim=head_dim, original_max_position_embeddings=length, **named
    )
    ours = Llama3(head_dim, length, **options).frequencies(torch.arange(3), torch.float32)
    assert_close(ours, theirs, rtol=2e-6, atol=0)
    assert factor == 1


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_dynamic_ntk_is_transformers_at_each_length(factor):
    rotation = DynamicNTK(16, LENGTH, factor=factor)
    ours = rotation.frequencies(torch.arange(200), torch.float32)
    for position in (0, 1, LENGTH - 2, LENGTH - 1, LENGTH, LENGTH + 1, 100, 199):
        theirs, _ = inverse_frequencies("dynamic", seq_len=position + 1, factor=factor)
        assert_close(ours[position], theirs, rtol=2e-6, atol=0)


def test_dynamic_ntk_is_what_transformers_computes_token_by_token():
    (query, key), length = draw(3 * LENGTH, batch=1), 3 * LENGTH
    peer = llama.LlamaRotaryEmbedding(config(rope_type="dynamic", factor=2.0))
    ours = DynamicNTK(16, LENGTH, factor=2.0)(query, key, torch.arange(length))
    for p in range(length):
        now = slice(p, p + 1)
        waves = peer(query, torch.tensor([[p]]))
        theirs = llama.apply_rotary_pos_emb(query[:, :, now], key[:, :, now], *waves)
        for mine, their in zip(ours, theirs, strict=True):
            assert_close(mine[:, :, now], their, rtol=0, atol=2e-4)


def test_ntk_is_dynamic_ntk_of_transformers_at_the_length_it_reaches():
    theirs, _ = inverse_frequencies("dynamic", seq_len=16 * LENGTH, factor=1.0)
    ours = NTK(16, factor=16.0).frequencies(torch.arange(1), torch.float32)
    assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kind", "build", "parameters"),
    [
        ("linear", PositionInterpolation, {"factor": 4.0}),
        (
            "yarn",
            lambda *args, **options: YaRN(*args, 4096, **options),
            {"factor": 4.0, "original_max_position_embeddings": 4096},
        ),
        (
            "llama3",
            lambda *args, **options: Llama3(*args, 4096, **options),
            {
                **{"factor": 4.0, "original_max_position_embeddings": 4096},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            },
        ),
        (
            "dynamic",
            lambda *args, **options: DynamicNTK(*args, LENGTH, **options),
            {"factor": 4.0},
        ),
        (
            "linear",
            lambda *args, factor, **options: RandomizedRoPE(*args, 9, **options).eval(),
            {"factor": 1.0},
        ),
    ],
)
def test_base_and_fraction_are_taken_by_every_rotation(kind, build, parameters):
    theirs, _ = inverse_frequencies(kind, seq_len=100, **parameters, rope_theta=500.0)
    ours = build(32, factor=4.0, base=500.0, fraction=0.5)
    frequencies = ours.frequencies(torch.tensor([99]), torch.float32)
    assert_close(frequencies.flatten(), theirs, rtol=2e-6, atol=0)
    (query, key), positions = draw(5, head_dim=32), torch.arange(5)
    for x, turned in zip((query, key), ours(query, key, positions), strict=True):
        assert torch.equal(turned[..., 16:], x[..., 16:])
        assert (turned[..., 1:, :16] - x[..., 1:, :16]).abs().min() > 0


def test_ntk_and_xpos_take_base_and_fraction():
    x = torch.randn(2, 1, 1, 3, 32, dtype=torch.float64)
    positions = torch.tensor([0, 9, 700])
    options = {"base": 500.0, "fraction": 0.5}
    ours = NTK(32, factor=4.0, **options)(*x, positions)
    theirs = RoPE(16, base=500.0 * 4.0 ** (16 / 14))(*x[..., :16], positions)
    for mine, their in zip(ours, theirs, strict=True):
        assert_close(mine[..., :16], their, rtol=1e-12, atol=1e-12)
    ours = XPos(32, scale_base=64.0, **options)(*x, positions)
    pairs = torch.arange(8, dtype=torch.float64) / 8
    scale = (((pairs + 0.4) / 1.4) ** (positions[:, None] / 64)).repeat(1, 2)
    theirs = RoPE(16, base=500.0)(*x[..., :16], positions)
    for mine, their, whole in zip(ours, (theirs[0] * scale, theirs[1] / scale), x, strict=True):
        assert_close(mine[..., :16], their, rtol=1e-12, atol=1e-12)
        assert torch.equal(mine[..., 16:], whole[..., 16:])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_xpos_has_the_scores_of_x_transformers():
    package = pytest.importorskip("x_transformers.x_transformers")
    query, key, positions = *draw(300, batch=1), torch.arange(300)
    key = key.repeat_interleave(2, dim=1)
    angles, scale = package.RotaryEmbedding(16, use_xpos=True)(positions)

    def neighbours(x):  # the pairs of x-transformers
        return x.unflatten(-1, (2, 8)).mT.flatten(-2)

    theirs = package.apply_rotary_pos_emb(neighbours(query), angles, scale)
    theirs = theirs @ package.apply_rotary_pos_emb(neighbours(key), angles, 1 / scale).mT
    ours, our_keys = XPos(16)(query, key, positions)
    assert_close(ours @ our_keys.mT, theirs, rtol=1e-4, atol=1e-3)
