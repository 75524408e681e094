"""The forms of DAPE that have names, what may stand before what, and how names are read."""

import re

import pytest
import torch
from torch.testing import assert_close

import textbook
from dape.errors import UserError
from dape.positions import scheme

DIMENSIONS = {"num_heads": 3, "head_dim": 4, "hidden_size": 12, "train_length": 16}


@pytest.mark.parametrize(
    ("prefix", "logits"),
    [
        ("dape", lambda a, b, f: a + b + f(torch.cat((a, b), dim=1))),
        ("dape-concat", lambda a, b, f: a + f(torch.cat((a, b), dim=1))),
        ("dape-add", lambda a, b, f: a + b + f(a + b)),
        ("dape-bias", lambda a, b, f: a + b + f(b)),
        ("talking-heads", lambda a, b, f: a + b),
    ],
)
@pytest.mark.parametrize("base", ["kerple", "kerple-power", "t5", "sandwich", "fire"])
def test_a_form_s_logits_are_those_of_the_paper(prefix, logits, base):
    found = scheme.resolve(f"{prefix}-{base}")
    bias, adapter = (found.build(p, DIMENSIONS, {}).double() for p in ("bias", "adapter"))
    scores = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    shift = bias(torch.arange(5), torch.arange(5)).double()

    def f(x):
        w1, w2 = adapter.weight_in[:, :, 0], adapter.weight_out[:, :, 0]
        hidden = textbook.leaky_relu(w1 @ x.flatten(2) + adapter.bias_in[:, None])
        return (w2 @ hidden + adapter.bias_out[:, None]).view(1, 3, 5, 5)

    assert type(bias) is type(scheme.resolve(base).build("bias", DIMENSIONS, {}))
    expected = logits(scores, shift[None], f)
    assert_close(adapter(scores, shift), expected, rtol=1e-12, atol=1e-13)


def test_without_a_bias_dape_has_one_form():
    found = [name for name in scheme.names() if re.fullmatch("dape.*-nope", name)]
    assert found == ["dape-nope", "dape3-nope", "dape5-nope", "dape7-nope"]


@pytest.mark.parametrize("name", ["dape-add-rope", "dape-cope", "talking-heads-transformer-xl"])
def test_what_has_no_meaning_has_no_name(name):
    with pytest.raises(UserError, match=f"unknown scheme '{name}'"):
        scheme.resolve(name)


def test_no_name_can_be_read_in_two_ways():
    read = [base for base in scheme.BASES]
    for adapter in scheme.ADAPTERS.values():
        fitting = [base for base in scheme.BASES.values() if scheme.fits(adapter, base)]
        read += [f"{adapter.name}-{base.name}" for base in fitting]
    assert sorted(read) == sorted(scheme.names())


@pytest.mark.parametrize(
    ("name", "place", "parameters"),
    [
        ("kerple-power", "bias", 24),
        ("t5", "bias", 384),
        ("sandwich", "bias", 0),
        ("fire", "bias", 462),
        ("cope", "adapter", 4096),
        ("transformer-xl", "adapter", 591_360),
        ("talking-heads-nope", "adapter", 144),
        ("dape-kerple", "adapter", 1196),
        ("dape3-kerple", "adapter", 3500),
        ("dape-concat-kerple", "adapter", 1196),
        ("dape-add-kerple", "adapter", 812),
        ("dape-bias-kerple", "adapter", 812),
        ("dape-nope", "adapter", 812),
    ],
)
def test_a_layer_of_the_125m_model_costs_what_arithmetic_says(name, place, parameters):
    dimensions = {"num_heads": 12, "head_dim": 64, "hidden_size": 768, "train_length": 512}
    module = scheme.resolve(name).build(place, dimensions, {})
    assert sum(p.numel() for p in module.parameters()) == parameters
