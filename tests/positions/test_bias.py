"""Biases: published slopes, formulas, positivity, and distances that bfloat16 cannot hold."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import textbook
from dape.positions import bias as biases
from dape.positions.bias import ALiBi, Bias, Kerple, NoBias

BIASES = [
    module
    for module in vars(biases).values()
    if inspect.isclass(module) and issubclass(module, Bias) and module is not Bias
]

# The slopes of the authors' code for 12 heads (GPT-2 small) and 25 (GPT-2 XL).
EIGHT = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
TWELVE = [*EIGHT, 0.70710678, 0.35355339, 0.17677670, 0.08838835]
TWENTY_FIVE = [
    0.70710678, 0.5, 0.35355339, 0.25, 0.17677670, 0.125, 0.08838835, 0.0625, 0.04419417, 0.03125,
    0.02209709, 0.015625, 0.01104854, 0.0078125, 0.00552427, 0.00390625, 0.84089642, 0.59460356,
    0.42044821, 0.29730178, 0.21022410, 0.14865089, 0.10511205, 0.07432544, 0.05255603,
]  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [(1, [1 / 256]), (2, [1 / 16, 1 / 256]), (8, EIGHT), (12, TWELVE), (25, TWENTY_FIVE)],
)
def test_alibi_has_the_published_slopes(heads, slopes):
    assert_close(ALiBi(heads).slopes(), torch.tensor(slopes), rtol=1e-6, atol=0)


@given(heads=st.integers(1, 40))
def test_alibi_slopes_equal_the_textbook(heads):
    expected = textbook.alibi_slopes(heads).float()
    assert_close(ALiBi(heads).slopes(), expected, rtol=3e-7, atol=0)


def test_kerple_equals_its_formula_with_the_p_and_a_it_names():
    bias = Kerple(5).double()
    query, key = torch.tensor([3, 700]), torch.tensor([0, 3, 4, 700, 9000])
    expected = torch.stack(
        [textbook.kerple(bias.p, bias.a)((i - key).abs().double()) for i in query], dim=1
    )
    assert_close(bias(query, key), expected, rtol=1e-13, atol=0)


def test_kerple_starts_uniform_between_the_floor_and_two_or_one():
    bias = Kerple(20_000)
    for values, high in ((bias.p, 2.0), (bias.a, 1.0)):
        assert 0.01 - 1e-6 < values.min() < 0.02 and 0.999 * high < values.max() < high + 1e-6
        deciles = torch.quantile(values, torch.linspace(0.1, 0.9, 9))
        uniform = 0.01 + (high - 0.01) * torch.linspace(0.1, 0.9, 9)
        assert_close(deciles, uniform, rtol=0, atol=0.02 * high)  # 0.004 is one standard error


def test_kerple_stays_positive_however_far_it_is_trained():
    bias = Kerple(4)
    optimizer = torch.optim.SGD(bias.parameters(), lr=3.0)
    for _ in range(50):
        optimizer.zero_grad()
        (bias.p.sum() + bias.a.sum()).backward()  # to lower both as far as it goes
        optimizer.step()
    assert all((values > 0).all() and (values < 0.05).all() for values in (bias.p, bias.a))


def test_no_bias_is_zero_and_takes_no_memory():
    bias = NoBias(4)(torch.arange(3).expand(2, -1), torch.arange(5).expand(2, -1))
    assert bias.shape == (2, 4, 3, 5) and not bias.any()
    assert bias.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("bias", BIASES)
def test_a_batch_axis_of_positions_leads(bias):
    bias = bias(3)
    query, key = torch.randint(0, 50, (2, 4)), torch.randint(0, 50, (2, 6))
    batched = bias(query, key)
    assert batched.shape == (2, 3, 4, 6)
    for n in range(2):
        assert torch.equal(batched[n], bias(query[n], key[n]))


@pytest.mark.parametrize("bias", [b for b in BIASES if b.relative])
@given(shift=st.integers(0, 1000), seed=st.integers(0, 2**31))
def test_relative_biases_see_the_distance_alone_in_both_directions(bias, shift, seed):
    torch.manual_seed(seed)
    bias, query, key = bias(3), torch.randint(0, 300, (5,)), torch.randint(0, 300, (7,))
    expected = bias(query, key).detach()
    # Of the largest entry: some are built from sines of the positions themselves.
    near = {"rtol": 0, "atol": 1e-4 * float(expected.abs().max())}
    assert_close(bias(query + shift, key + shift).detach(), expected, **near)
    assert_close(bias(key, query).mT.detach(), expected, **near)


@pytest.mark.parametrize("bias", [b for b in BIASES if b.relative])
@given(shift=st.integers(0, 2**40), seed=st.integers(0, 2**31))
def test_a_shift_of_any_size_changes_no_bit(bias, shift, seed):
    torch.manual_seed(seed)
    bias, query, key = bias(3), torch.randint(0, 10**6, (5,)), torch.randint(0, 10**6, (7,))
    assert torch.equal(bias(query + shift, key + shift), bias(query, key))


@pytest.mark.parametrize("bias", BIASES)
def test_casting_to_bfloat16_rounds_parameters_but_no_position(bias):
    bias = bias(4).to(torch.bfloat16)
    query, key = torch.tensor([9000]), 9000 - torch.tensor([255, 256, 257, 4099, 4100, 8999])
    cast = bias(query, key)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, bias.float()(query, key))


@pytest.mark.parametrize("bias", [ALiBi, Kerple])
def test_bfloat16_tells_every_distance_from_the_next(bias):
    bias = bias(4).to(torch.bfloat16)
    distances = torch.arange(255, 300)
    by_distance = bias(torch.tensor([9000]), 9000 - distances)[:, 0]
    assert (by_distance[:, 1:] < by_distance[:, :-1]).all()
