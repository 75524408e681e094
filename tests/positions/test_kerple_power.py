"""Kerple's power kernel against its formula, with bounds and gradients."""

import pytest
import torch
from torch.testing import assert_close

from dape.positions.bias import KerplePower


def test_it_is_its_formula_with_the_a_and_p_it_names():
    bias = KerplePower(5).double()
    query, key = torch.tensor([3, 700]), torch.tensor([0, 3, 4, 700, 9000])
    expected = [
        [[-bias.a[h].item() * abs(i - j) ** bias.p[h].item() for j in key.tolist()]
         for i in query.tolist()] for h in range(5)
    ]  # fmt: skip
    assert_close(bias(query, key), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


def test_the_gradients_are_those_of_the_formula_also_at_distance_zero():
    bias = KerplePower(3).double()
    positions, coefficients = torch.arange(6), torch.randn(3, 6, 6, dtype=torch.float64)
    (bias(positions, positions) * coefficients).sum().backward()
    a, p = bias.a.detach(), bias.p.detach()
    slope_a, slope_p = torch.zeros_like(a), torch.zeros_like(p)
    for i in range(6):
        for j in range(6):
            if i != j:  # 0^p is 0 for every p
                delta = torch.tensor(float(abs(i - j)), dtype=torch.float64)
                slope_a -= coefficients[:, i, j] * delta**p
                slope_p -= coefficients[:, i, j] * a * delta**p * delta.log()
    assert_close(bias.raw_a.grad, slope_a * (1 - (-a).exp()), rtol=1e-12, atol=1e-12)
    assert_close(bias.raw_p.grad, slope_p * p * (1 - p / 2), rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_those_of_the_formula_also_at_distance_zero():
    bias = KerplePower(3).double()
    positions, index = torch.arange(6), torch.arange(6.0, dtype=torch.float64)
    delta = (index[:, None] - index).abs()

    def formula(raw_p, raw_a):
        power = torch.exp(2 * raw_p.sigmoid()[:, None, None] * delta.clamp(min=1).log())
        return (-(1 + raw_a.exp()).log()[:, None, None] * power * (delta > 0)).square().sum()

    def ours(raw_p, raw_a):
        lent = {"raw_p": raw_p, "raw_a": raw_a}
        return torch.func.functional_call(bias, lent, (positions, positions)).square().sum()

    at = bias.raw_p.detach(), bias.raw_a.detach()
    expected = torch.autograd.functional.hessian(formula, at)
    assert_close(torch.autograd.functional.hessian(ours, at), expected)


def test_it_starts_uniform_within_the_bounds():
    bias = KerplePower(20_000)
    for values, low, high in ((bias.p, 0.01, 1.99), (bias.a, 0.01, 1.0)):
        assert low - 1e-5 < values.min() < low + 0.01 and high - 0.01 < values.max() < high + 1e-5
        tenths = torch.linspace(0.1, 0.9, 9)
        deciles = torch.quantile(values, tenths)
        assert_close(deciles, low + (high - low) * tenths, rtol=0, atol=0.02 * high)


@pytest.mark.parametrize("sign", [1, -1])
def test_no_step_leaves_the_bounds(sign):
    bias = KerplePower(4)
    optimizer = torch.optim.SGD(bias.parameters(), lr=3.0)
    for _ in range(50):
        optimizer.zero_grad()
        (sign * (bias.p.sum() + bias.a.sum())).backward()
        optimizer.step()
    assert ((bias.p > 0) & (bias.p <= 2)).all() and (bias.a > 0).all()
    assert ((bias.p < 0.05) if sign > 0 else (bias.p > 1.95)).all()


def test_in_bfloat16_far_neighbours_still_differ():
    bias = KerplePower(4).to(torch.bfloat16)
    steps = bias(torch.tensor([9000]), torch.arange(0, 9000)).diff(dim=-1)
    assert (steps > 0).all()


def test_a_head_has_two_parameters():
    assert sum(p.numel() for p in KerplePower(12).parameters()) == 24
