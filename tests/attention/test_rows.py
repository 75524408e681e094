"""The numbers of a row for the backward pass, against PyTorch's operations."""

import math

import pytest
import torch
from one_band import problem_of
from torch.testing import assert_close

from dape.attention.fused.problem import Result
from dape.attention.fused.rows import Rows
from dape.attention.fused.terms import Mixed

pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.skipif(torch.cuda.is_available(), reason="computed by Triton's interpreter"),
]


@pytest.mark.parametrize("place", ["first", "last", "lse"])
@pytest.mark.parametrize(("heads", "rows", "width"), [(3, 1, 16), (3, 150, 24), (40, 70, 96)])
def test_the_unit_is_the_power_of_two_above_all_gradients(heads, rows, width, place):
    terms = Mixed(*(torch.zeros(1, 1) for _ in range(4)))
    problem = problem_of(terms, heads, rows, rows, 0, True, False, torch.float16)
    problem = problem._replace(value=torch.zeros(2, heads, rows, width).half())
    found = Result.of(problem, True)
    found.out.normal_(), found.rest.normal_(0, 1e-3), found.lse.normal_()
    grad_out = torch.randn(2, rows, heads, width).mul(1e-4).half().transpose(1, 2)
    grad_lse = torch.zeros_like(found.lse) if place == "lse" else None
    top = 0.37
    largest = {"first": grad_out[0, 0, 0], "last": grad_out[-1, -1, -1], "lse": grad_lse}[place]
    largest.view(-1)[-1] = -top
    given = Rows.of(problem, found, grad_out, grad_lse)
    assert given.unit == 2 ** math.ceil(math.log2(top))
    assert torch.equal(given.scaled.double(), grad_out.double() / given.unit)
    out = found.out.double() + found.rest.double()
    delta = (out * grad_out.double()).sum(-1) - (0 if grad_lse is None else grad_lse.double())
    assert_close(given.delta.double(), delta / given.unit, rtol=1e-5, atol=1e-5)
