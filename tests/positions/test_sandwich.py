"""Sandwich against attention-gym and the paper's sum of cosines."""

import math

import pytest
import torch
from torch.testing import assert_close

from dape.errors import UserError
from dape.positions.bias import Sandwich


def formula(i, j, head, heads, d_bar):
    waves = (math.cos((i - j) / 10000 ** (2 * f / d_bar)) for f in range(d_bar // 2))
    return sum(waves) * heads / (8 * head)


def test_it_is_attention_gym_s():
    gym = pytest.importorskip("attn_gym.mods.sandwich")
    mod = gym.generate_sandwich_bias(12, 700)
    positions, heads = torch.arange(700), torch.arange(12)
    theirs = mod(0.0, None, heads[:, None, None], positions[:, None], positions)
    assert_close(Sandwich(12)(positions, positions), theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("d_bar", [128, 6])
def test_it_is_the_sum_of_cosines_on_both_sides_and_far_away(d_bar):
    query, key = [0, 7, 16_384, 1_000_000], [0, 1, 8, 257, 16_383, 999_744]
    expected = [[[formula(i, j, h, 5, d_bar) for j in key] for i in query] for h in range(1, 6)]
    ours = Sandwich(5, d_bar)(torch.tensor(query), torch.tensor(key))
    assert_close(ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-7, atol=1e-7)


def test_it_has_no_parameters_and_casting_a_model_changes_nothing():
    bias, positions = Sandwich(4), torch.arange(400)
    assert not list(bias.state_dict())
    expected = bias(positions, positions)
    assert torch.equal(bias.to(torch.bfloat16)(positions, positions), expected)
    assert (expected[:, 300, 40] != expected[:, 300, 41]).all()


@pytest.mark.parametrize(("d_bar", "message"), [(0, "at least 2"), (3, "even and positive")])
def test_an_odd_width_is_refused(d_bar, message):
    with pytest.raises(UserError, match=f"d_bar={d_bar} must be {message}"):
        Sandwich(4, d_bar)
