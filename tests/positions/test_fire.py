"""FIRE against the paper's formula written anew in float64, gradients included."""

import math

import pytest
import torch
from torch.testing import assert_close

import dape
from dape.errors import UserError
from dape.positions import scheme
from dape.positions.bias import FIRE


def formula(i, j, c, threshold, w1, b1, w2, b2):
    """f(psi(|i - j|) / psi(max(i, L))) of every head, for 0 <= j <= i."""

    def psi(x):
        return torch.log(1 + c * x)

    x = psi(torch.tensor(float(i - j), dtype=c.dtype)) / psi(threshold.clamp(min=float(i)))
    hidden = w1 * x + b1
    return w2 @ torch.where(hidden > 0, hidden, 0) + b2


def natural(bias):
    """c, L, and the weights and biases of f, as leaves of their own."""
    names = (bias.c[0], bias.threshold[0], bias.weight_in[:, 0], bias.bias_in)
    return [x.detach().clone().requires_grad_() for x in (*names, bias.weight_out, bias.bias_out)]


def causal_sum(bias, parameters, size, coefficients):
    pairs = [(i, j) for i in range(size) for j in range(i + 1)]
    ours = bias(torch.arange(size), torch.arange(size))
    theirs = [formula(i, j, *parameters) for i, j in pairs]
    i, j = zip(*pairs, strict=True)
    ours, theirs = ours[:, i, j], torch.stack(theirs, dim=1)
    return ours, theirs, (ours * coefficients).sum(), (theirs * coefficients).sum()


def test_the_threshold_starts_at_the_training_length_or_where_it_is_told():
    assert FIRE(3, train_length=512).threshold.item() == pytest.approx(512)
    bias = FIRE(3, train_length=512, threshold=12.5).double()
    assert bias.threshold.item() == pytest.approx(12.5, rel=1e-6)
    bias.reset_parameters()
    assert bias.threshold.item() == pytest.approx(12.5, rel=1e-6)
    parameters = natural(bias)
    ours, theirs, *_ = causal_sum(bias, parameters, 30, 1.0)
    assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    options = {"bias": {"threshold": 12.5}}
    sizes = {"num_heads": 3, "train_length": 64}
    built = scheme.resolve("dape-fire").build("bias", sizes, options)
    assert built.threshold.item() == pytest.approx(12.5, rel=1e-6)
    with pytest.raises(UserError, match=r"threshold=0\.5 must be at least 1"):
        FIRE(3, threshold=0.5)


def test_values_and_gradients_are_the_formula_s_before_and_after_the_threshold():
    bias = FIRE(3, train_length=10, hidden=7).double()
    parameters = natural(bias)
    coefficients = torch.randn(3, 24 * 25 // 2, dtype=torch.float64)
    ours, theirs, our_sum, their_sum = causal_sum(bias, parameters, 24, coefficients)
    assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    our_sum.backward()
    c, threshold, w1, b1, w2, b2 = torch.autograd.grad(their_sum, parameters)
    expected = {
        "log_c": c * bias.c,  # d / d log c = c d / dc
        "log_threshold": threshold * bias.threshold,
        "weight_in": w1[:, None],
        "bias_in": b1,
        "weight_out": w2,
        "bias_out": b2,
    }
    assert set(expected) == {name for name, _ in bias.named_parameters()}
    for name, gradient in expected.items():
        assert gradient.abs().min() > 0 or name in ("weight_in", "bias_in", "weight_out")
        assert_close(bias.get_parameter(name).grad, gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["log_c", "log_threshold"])
def test_c_and_the_threshold_have_the_slope_of_finite_differences(name):
    # 8.5, as at a whole L the slope jumps.
    bias, step = FIRE(2, train_length=10).double(), 1e-6
    parameter, positions = bias.get_parameter(name), torch.arange(20)
    with torch.no_grad():
        bias.log_threshold.fill_(math.log(8.5))
        values = []
        for sign in (-1, 1):
            parameter += sign * step
            values.append(bias(positions, positions).sum())
            parameter -= sign * step
    bias(positions, positions).sum().backward()
    assert_close(parameter.grad[0], (values[1] - values[0]) / (2 * step), rtol=1e-6, atol=0)


def ratio():
    """FIRE whose f is the identity on its argument."""
    bias = FIRE(1, train_length=10, hidden=1).double()
    with torch.no_grad():
        for parameter, value in zip(bias.parameters(), (None, None, 1, 0, 1, 0), strict=True):
            if value is not None:
                parameter.fill_(value)
    return bias


def test_the_argument_is_shared_up_to_the_threshold_and_then_rises_to_one():
    bias, positions = ratio(), torch.arange(40)
    rows = bias(positions, positions)[0]
    assert_close(rows[5, :6], rows[10, 5:11])
    assert (rows[20, 15:20] < rows[10, 5:10]).all()
    assert_close(rows[10:, 0], torch.ones(30, dtype=torch.float64))


def test_bidirectional_use_is_symmetric_and_never_above_one():
    bias, positions = ratio(), torch.arange(40)
    both = bias(positions, positions)
    assert torch.equal(both, both.mT)
    assert both.max() == 1


@pytest.mark.parametrize("name", ["fire", "dape-fire", "dape3-fire", "dape-concat-fire"])
def test_the_activation_is_relu_alone_and_under_dape(name):
    dimensions = {"num_heads": 2, "head_dim": 4, "hidden_size": 8, "train_length": 16}
    bias = scheme.resolve(name).build("bias", dimensions, {})
    assert type(bias) is FIRE
    with torch.no_grad():
        bias.weight_in.fill_(-1)  # every unit sees at most zero, of which LeakyReLU keeps a part
        bias.bias_in.zero_()
    out = bias(torch.arange(9), torch.arange(9))
    assert torch.equal(out, bias.bias_out[:, None, None].expand_as(out))


def test_c_starts_at_a_tenth_and_the_threshold_at_the_training_length():
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = dape.DapeForCausalLM(dape.DapeConfig(scheme="dape-fire", train_length=37, **sizes))
    for layer in model.model.layers:
        bias = layer.self_attn.position_bias
        assert_close(bias.threshold, torch.tensor([37.0]))
        assert_close(bias.c, torch.tensor([0.1]))
        assert bias.weight_in.abs().max() <= 1 and bias.weight_out.abs().max() <= 32**-0.5
    assert FIRE(4).threshold.item() == pytest.approx(512)


def test_both_layers_start_as_linear_layers_do():
    bias = FIRE(500, hidden=400)
    for weight, shift in ((bias.weight_in, bias.bias_in), (bias.weight_out, bias.bias_out)):
        like = torch.nn.Linear(weight.shape[1], weight.shape[0])
        for ours, theirs in ((weight, like.weight), (shift, like.bias)):
            assert_close(ours.abs().max(), theirs.abs().max(), rtol=5e-2, atol=0)
            assert_close(ours.std(), theirs.std(), rtol=0.1, atol=0)
            assert ours.abs().max() <= weight.shape[1] ** -0.5


def test_c_and_the_threshold_stay_positive_however_far_they_are_trained():
    bias = FIRE(1)
    optimizer = torch.optim.SGD([bias.log_c, bias.log_threshold], lr=1.0)
    for _ in range(50):
        optimizer.zero_grad()
        (bias.log_c + bias.log_threshold).sum().backward()
        optimizer.step()
    assert 0 < bias.c.item() < 1e-20 and 0 < bias.threshold.item() < 1e-15


def test_in_bfloat16_far_neighbours_still_differ():
    bias = ratio().to(torch.bfloat16)
    rows = bias(torch.tensor([9000]), torch.arange(9001))
    assert rows.dtype == torch.float32
    assert (rows[0, 0].diff() < 0).all()


def test_twelve_heads_have_462_parameters():
    # c, L, 32 weights and biases in, 32 weights and a bias for each head out
    assert sum(p.numel() for p in FIRE(12).parameters()) == 2 + 64 + 12 * 33


@pytest.mark.parametrize("name", ["train_length", "hidden"])
def test_impossible_sizes_are_refused(name):
    with pytest.raises(UserError, match=f"{name}=0 must be at least 1"):
        FIRE(4, **{name: 0})
