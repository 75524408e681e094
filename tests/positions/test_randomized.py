"""Randomised positions: the draw in training, and no draw in evaluation."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from turns import LENGTH, draw, rope

from dape.errors import UserError
from dape.positions.rotary import RandomizedRoPE, RoPE


def drawn(rotation, length):
    """Return the positions that a rotation took, read off its slowest pair of keys."""
    ones = torch.zeros(1, 1, length, 16, dtype=torch.float64)
    ones[..., 7] = 1
    _, key = rotation(ones, ones, torch.arange(length))
    angles = torch.atan2(key[0, 0, :, 15], key[0, 0, :, 7])
    positions = angles / rope(10000)[7]
    assert_close(positions, positions.round(), rtol=0, atol=1e-6)
    return positions.round().long()


def test_training_draws_sorted_unique_positions_over_the_whole_pool():
    rotation = RandomizedRoPE(16, 8)
    counts = torch.zeros(32)
    assert drawn(rotation, 8).unique().shape == (8,)
    for _ in range(2000):
        positions = rotation.draw(8, torch.device("cpu"))
        assert (positions.diff() > 0).all() and positions[0] >= 0 and positions[-1] < 32
        counts[positions] += 1
    # Each of the 4 x 8 positions in one draw of four; a standard deviation is 20 of 500.
    assert ((counts - 500).abs() < 90).all()


def test_every_call_draws_anew_the_seed_decides_and_the_batch_shares():
    rotation, (query, key) = RandomizedRoPE(16, LENGTH), draw(LENGTH)
    draws = {tuple(drawn(rotation, 10).tolist()) for _ in range(10)}
    assert len(draws) == 10
    query[1], key[1] = query[0], key[0]
    torch.manual_seed(3)
    first = rotation(query, key, torch.arange(LENGTH))
    torch.manual_seed(3)
    again = rotation(query, key, torch.arange(LENGTH))
    for mine, theirs in zip(first, again, strict=True):
        assert torch.equal(mine, theirs) and torch.equal(mine[0], mine[1])


def test_training_turns_by_the_draw_and_evaluation_by_the_positions():
    rotation, plain, (query, key) = RandomizedRoPE(16, LENGTH, pool=50), RoPE(16), draw(50)
    # Fifty of fifty positions leave nothing to chance.
    for training, positions in itertools.product(
        (True, False), (torch.arange(50), torch.arange(50).expand(2, -1))
    ):
        ours = rotation.train(training)(query, key, positions)
        for mine, theirs in zip(ours, plain(query, key, torch.arange(50)), strict=True):
            assert torch.equal(mine, theirs)
    far = torch.arange(50) + 10_000
    assert torch.equal(rotation(query, key, far)[0], plain(query, key, far)[0])


def test_more_tokens_than_the_pool_holds_are_refused_in_training_alone():
    rotation = RandomizedRoPE(16, 8)
    inputs = *draw(33), torch.arange(33)
    with pytest.raises(UserError, match="33 tokens do not fit the pool=32 of randomised"):
        rotation(*inputs)
    assert torch.equal(rotation.eval()(*inputs)[0], RoPE(16)(*inputs)[0])


@pytest.mark.unhooked
def test_drawing_compiles_and_the_seed_still_decides():
    torch.compiler.reset()
    rotation, (query, key) = RandomizedRoPE(16, LENGTH), draw(6)
    compiled = torch.compile(rotation, fullgraph=True, backend="eager")
    outputs = []
    for call in (compiled, rotation):
        torch.manual_seed(5)
        outputs.append(call(query, key, torch.arange(6))[0])
    assert_close(*outputs)
