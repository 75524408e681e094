"""DAPE: its formulas, sizes and start; that the operator agrees is shown in tests/attention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import textbook
from dape.errors import UserError
from dape.positions.adapter import DAPE, INPUTS


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("hidden", "kernel_size", "layer", "model"),
    [(32, 1, 1_196, 14_352), (4, 1, 160, 1_920), (32, 3, 3_500, 42_000)],
)
def test_twelve_layers_of_twelve_heads_cost_what_the_paper_s_do(hidden, kernel_size, layer, model):
    adapters = nn.ModuleList(DAPE(12, hidden, kernel_size) for _ in range(12))
    assert (parameters(adapters[0]), parameters(adapters)) == (layer, model)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("inputs", INPUTS)
@given(heads=st.integers(1, 5), hidden=st.integers(1, 7), seed=st.integers(0, 2**31))
def test_every_pair_is_mapped_by_the_formula(inputs, residual, heads, hidden, seed):
    torch.manual_seed(seed)
    adapter = DAPE(heads, hidden, residual=residual, inputs=inputs).double()
    scores, bias = torch.randn(2, heads, 3, 4).double(), torch.randn(heads, 3, 4).double()
    weights = [
        w.squeeze(-1) for w in (adapter.weight_in, adapter.bias_in[:, None], adapter.weight_out)
    ]
    formula = textbook.dape(*weights, adapter.bias_out, inputs, residual)
    out = adapter(scores, bias)
    for b in range(2):
        for i in range(3):
            expected = formula(scores[b, :, i], bias[:, i], [0, 1, 2, 3])
            assert_close(out[b, :, i], expected, rtol=1e-12, atol=1e-12)


def test_the_parameters_start_as_those_of_a_linear_layer_do():
    adapter = DAPE(12, 4096, kernel_size=3)
    for weight, bias in (
        (adapter.weight_in, adapter.bias_in),
        (adapter.weight_out, adapter.bias_out),
    ):
        like = nn.Conv1d(weight.shape[1], weight.shape[0], 3)
        for ours, theirs in ((weight, like.weight), (bias, like.bias)):
            if ours.numel() > 1000:
                assert_close(ours.abs().max(), theirs.abs().max(), rtol=1e-2, atol=0)
                assert_close(ours.std(), theirs.std(), rtol=5e-2, atol=0)
            assert ours.abs().max() <= (weight.shape[1] * 3) ** -0.5


def test_inputs_and_outputs_in_bfloat16_parameters_stay_float32():
    adapter = DAPE(3).to(torch.bfloat16)
    scores, bias = torch.randn(1, 3, 2, 2), torch.randn(3, 2, 2)
    assert torch.equal(adapter(scores, bias), adapter.float()(scores, bias))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inputs": "both"}, "inputs='both' is not one of concat, sum, bias, scores"),
        ({"kernel_size": 2}, "kernel_size=2 must be odd"),
        ({"kernel_size": 0}, "kernel_size=0 must be at least 1"),
        ({"kernel_size": -1}, "kernel_size=-1 must be at least 1"),
        ({"hidden": 0}, "hidden=0 must be at least 1"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as error:
        DAPE(12, **options)
    assert "\n" not in str(error.value)
