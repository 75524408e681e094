"""Talking heads against x-transformers and the sum over heads."""

import pytest
import torch
from rows import draw
from torch.testing import assert_close

import dape
from dape.positions.adapter import TalkingHeads


def test_each_head_takes_its_sum_and_a_mixture_of_all():
    scores, bias, _ = draw()
    adapter = TalkingHeads(4).double()
    torch.nn.init.normal_(adapter.weight)
    total = scores + bias
    for h in range(4):
        mixed = sum(adapter.weight[h, g] * total[:, g] for g in range(4))
        assert_close(adapter(scores, bias)[:, h], total[:, h] + mixed, rtol=1e-12, atol=1e-12)


def test_it_starts_as_its_base_and_learns():
    scores, bias, _ = draw()
    adapter = TalkingHeads(4).double()
    assert torch.equal(adapter(scores, bias), scores + bias)
    adapter(scores, bias)[:, 1].sum().backward()
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[1] = (scores + bias).sum((0, 2, 3))
    assert_close(adapter.weight.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_without_a_bias_it_is_x_transformers():
    package = pytest.importorskip("x_transformers.attend")
    query, key, value = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    theirs = package.Attend(heads=4, causal=True, pre_talking_heads=True).double()
    torch.nn.init.normal_(theirs.pre_softmax_talking_heads.weight)
    ours = TalkingHeads(4).double()
    ours.load_state_dict({"weight": theirs.pre_softmax_talking_heads.weight[:, :, 0, 0]})
    out = dape.attention(query, key, value, adapter=ours)
    # It takes the softmax in float32 whatever it is given.
    assert_close(out, theirs(query, key, value)[0], rtol=0, atol=1e-6)


def test_twelve_heads_have_144_parameters():
    assert sum(p.numel() for p in TalkingHeads(12).parameters()) == 144
