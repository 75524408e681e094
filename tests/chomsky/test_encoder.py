"""The encoder: sizes of the original, both directions, and one convention for every bias."""

import math

import pytest
import torch
from torch import nn

from dape.chomsky.encoder import Model, Noise, build, configure
from dape.chomsky.tasks import TASKS
from dape.errors import UserError
from dape.model.configuration import DapeConfig
from dape.model.modeling import DapeForCausalLM, DapeModel
from dape.positions.scheme import SCHEMES

SMALL = Model(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, adapter_hidden=8)
TASK = TASKS["reverse-string"]


def encoder(scheme, model=SMALL, task=TASK):
    return build(configure(model, scheme, task, 40), len(task.outputs), seed=0).eval()


@pytest.mark.parametrize("name", ["even-pairs", "bucket-sort", "binary-addition"])
def test_as_many_parameters_as_the_original(name):
    task = TASKS[name]
    found = sum(p.numel() for p in encoder("nope", Model(), task).parameters())
    assert found == 248_640 + 64 * (len(task.inputs) + 1) + 65 * len(task.outputs)


def test_parameters_start_as_in_the_original():
    model = encoder("nope", Model())
    cut = 0.8796  # deviation of a standard normal cut at two deviations
    for layer in model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.feed_forward[0]):
            assert linear.weight.std().item() == pytest.approx(cut / math.sqrt(64), rel=0.05)
        assert layer.feed_forward[2].weight.std().item() == pytest.approx(cut / 16, rel=0.05)
        assert layer.feed_forward[2].weight.abs().max() <= 2 / 16
        assert layer.self_attn.q_proj.bias is None and not layer.feed_forward[0].bias.any()
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02 * cut, rel=0.15)


def reference(model, inputs, out):
    """The post-norm encoder in PyTorch's own modules, without positions."""
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    tokens = nn.functional.pad(inputs, (0, out), value=model.config.vocab_size - 1)
    hidden = model.embed_tokens.weight.T[tokens] * math.sqrt(width)
    for layer in model.layers:
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True).double()
        attention = layer.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights = {
            "self_attn.in_proj_weight": torch.cat([each.weight for each in projections]),
            "self_attn.in_proj_bias": torch.zeros(3 * width),
            "self_attn.out_proj.weight": attention.o_proj.weight,
            "self_attn.out_proj.bias": torch.zeros(width),
            **{f"linear{n + 1}.{k}": v for n in (0, 1) for k, v in part(layer.feed_forward[2 * n])},
            **{f"norm1.{k}": v for k, v in part(layer.attention_norm)},
            **{f"norm2.{k}": v for k, v in part(layer.feed_forward_norm)},
        }
        block.load_state_dict(weights)
        hidden = block(hidden)
    return model.head(hidden[:, -out:])


def part(module):
    return module.state_dict().items()


def test_without_positions_it_is_the_transformer_encoder_of_torch():
    model = encoder("nope").double()
    inputs = torch.randint(2, (3, 9))
    expected = reference(model, inputs, 9)
    torch.testing.assert_close(model(inputs, 9), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_reads_and_learns(scheme):
    model = encoder(scheme)
    inputs = torch.randint(2, (2, 5))
    logits = model(inputs, 3)
    assert logits.shape == (2, 3, 2)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scheme", ["alibi", "kerple", "fire", "t5", "sandwich", "dape-kerple"])
def test_a_bias_is_the_same_on_both_sides(scheme):
    bias = encoder(scheme).layers[0].self_attn.position_bias
    positions = torch.arange(60)
    matrix = bias(positions, positions)
    torch.testing.assert_close(matrix, matrix.mT)
    # So a reversed sentence has the reversed hidden states.
    model = encoder(scheme)
    tokens = torch.randint(3, (2, 11))
    positions = {"query_positions": torch.arange(11), "key_positions": torch.arange(11)}
    attention = model.layers[0].self_attn
    x = model.embed_tokens(nn.functional.one_hot(tokens).float())
    forward, _ = attention(x, **positions)
    backward, _ = attention(x.flip(1), **positions)
    if not scheme.endswith("fire"):  # whose normaliser is a position
        torch.testing.assert_close(forward, backward.flip(1), atol=1e-5, rtol=1e-4)


def test_the_first_output_sees_the_last():
    model = encoder("rope")
    inputs = torch.zeros(1, 6, dtype=torch.long)
    changed = inputs.clone()
    changed[0, -1] = 1
    assert (model(inputs, 2) - model(changed, 2))[:, 0].abs().min() > 1e-4


def test_sinusoids_meet_vectors_scaled_once():
    model = encoder("sinusoidal")
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.tensor([[1, 0]]), 1)
    frequency = 10_000 ** -(torch.arange(0, 32, 2) / 32)
    angles = torch.arange(3)[:, None] * frequency
    waves = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
    expected = model.embed_tokens.weight.T[[1, 0, 2]] * math.sqrt(32) + waves
    torch.testing.assert_close(seen[0][0], expected)


def test_randomised_positions_are_sorted_distinct_and_uniform():
    model = encoder("randomized-rope", Model(num_hidden_layers=3, pool=64))
    generators = [torch.Generator().manual_seed(seed) for seed in range(200)]
    positions = model.noise(generators, 1, 8).positions
    assert positions.shape == (200, 3, 8)
    assert (positions.diff(dim=-1) > 0).all()
    assert positions.min() == 0 and positions.max() == 63
    means = positions.double().mean((0, 1))
    assert means.tolist() == pytest.approx([65 * k / 9 - 1 for k in range(1, 9)], abs=1.2)
    with pytest.raises(UserError, match="pool=64 has fewer positions than the 65 tokens"):
        model.noise(generators, 1, 65)


def test_positions_of_the_noise_are_those_of_the_rotation_in_both_modes():
    model = encoder("randomized-rope")
    inputs = torch.randint(2, (2, 4))
    positions = torch.tensor([[0, 3, 4, 70, 900, 1000]] * 2)
    noise = Noise(positions=positions)
    plain = encoder("rope")
    plain.load_state_dict(model.state_dict())
    expected = plain(inputs, 2, noise)
    torch.testing.assert_close(model.train()(inputs, 2, noise), expected)
    torch.testing.assert_close(model.eval()(inputs, 2, noise), expected)
    assert (plain(inputs, 2) - expected).abs().max() > 1e-3


def test_dropout_factors_have_mean_one_and_are_the_generators_own():
    model = encoder("sinusoidal")
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    keep = model.noise(generators, 64, 10, dropout=0.1).keep
    assert keep.shape == (2, 5, 64, 10, 32)
    assert keep.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert (keep == 0).double().mean().item() == pytest.approx(0.1, abs=0.002)
    alone = model.noise([torch.Generator().manual_seed(4)], 64, 10, dropout=0.1).keep
    assert torch.equal(alone[0], keep[1])


def test_dropout_at_each_place_changes_the_output():
    model = encoder("sinusoidal")
    inputs = torch.randint(2, (1, 4))
    base = model(inputs, 4)
    for place in range(5):
        keep = torch.ones(5, 1, 8, 32)
        torch.testing.assert_close(model(inputs, 4, Noise(keep)), base)
        keep[place] = 0
        assert (model(inputs, 4, Noise(keep)) - base).abs().max() > 1e-3


def test_a_model_that_is_not_causal_reads_both_ways():
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = torch.tensor([[1, 2, 3, 4]])
    changed = torch.tensor([[1, 2, 3, 5]])
    for causal in (True, False):
        model = DapeModel(DapeConfig(**sizes, causal=causal, scheme="dape-kerple")).eval()
        before, after = (model(each).last_hidden_state[:, 0] for each in (tokens, changed))
        assert torch.equal(before, after) is causal
    with pytest.raises(UserError, match="causal=False: a causal language model"):
        DapeForCausalLM(DapeConfig(**sizes, causal=False))
