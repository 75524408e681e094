"""The kernels of the map across heads by the interpreter, against the formula in float64."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, vmap

from dape.chomsky import heads
from dape.positions.adapter import DAPE

pytestmark = pytest.mark.unhooked
MODELS, BATCH, ROWS, KEYS = 3, 2, 9, 11  # two tiles, the second with an end within


def given(count, units, residual=True, taps=1, places=(ROWS, KEYS)):
    """Return an adapter without parameters, tensors, parameters and a gradient, in float64."""
    modules = [DAPE(count, units, taps, residual=residual).double() for _ in range(MODELS)]
    parameters = {
        name: torch.stack([dict(module.named_parameters())[name].detach() for module in modules])
        for name, _ in modules[0].named_parameters()
    }
    draw = torch.Generator().manual_seed(0)
    shapes = [(MODELS, BATCH, count, *places), (MODELS, count, *places)]
    scores, bias = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    wanted = torch.randn(shapes[0], generator=draw, dtype=torch.float64)
    return modules[0], (scores, bias, parameters), wanted


def kernel(scores, bias, parameters, residual=True):
    return heads.mapped(scores, bias, **parameters, residual=residual)


def learning(scores, bias, parameters, dtype):
    return (
        *(x.to(dtype, copy=True).requires_grad_() for x in (scores, bias)),
        {name: p.to(dtype, copy=True).requires_grad_() for name, p in parameters.items()},
    )


@pytest.fixture(autouse=True)
def filled():
    """Memory that a kernel leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("count", "units", "residual", "taps", "places"),
    [
        *((8, 64, True, 1, (ROWS, KEYS)), (3, 10, False, 1, (ROWS, KEYS))),
        *((5, 17, True, 1, (7, 5)), (8, 64, True, 3, (ROWS, KEYS))),
        *((3, 10, False, 3, (2, 70)), (5, 17, True, 3, (65, 1)), (1, 4, True, 3, (40, 2))),
        (3, 10, True, 3, (14, 8)),  # whose last score is the first of the third tile
    ],
)
def test_logits_and_gradients_are_those_of_the_formula(count, units, residual, taps, places):
    adapter, tensors, wanted = given(count, units, residual, taps, places)
    exact, single = (learning(*tensors, dtype) for dtype in (torch.float64, torch.float32))

    def formula(scores, bias, parameters):
        return functional_call(adapter, parameters, (scores, bias))

    def fused(scores, bias, parameters):
        return kernel(scores, bias, parameters, residual)

    expected, found = vmap(formula)(*exact), vmap(fused)(*single)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-6)
    leaves = [(*each[:2], *each[2].values()) for each in (exact, single)]
    gradients = zip(
        torch.autograd.grad(found, leaves[1], wanted.float()),
        torch.autograd.grad(expected, leaves[0], wanted),
        strict=True,
    )
    for own, truth in gradients:
        torch.testing.assert_close(own.double(), truth, atol=1e-6 * truth.abs().max(), rtol=0)


def moved(x):
    """Return an equal tensor with its last axis first in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1).detach().requires_grad_()


@pytest.mark.parametrize("taps", [1, 3])
def test_tensors_may_lie_in_memory_in_any_order(taps):
    """As the bias of T5 does, a view of rows of a table."""
    _, (scores, bias, parameters), wanted = given(3, 10, taps=taps)
    tensors = [x[0].float() for x in (scores, bias, *parameters.values())]

    def results(order):
        leaves = [order(x) for x in tensors]
        parts = dict(zip(parameters, leaves[2:], strict=True))
        found = heads.mapped(*leaves[:2], **parts)
        return found, *torch.autograd.grad(found, leaves, order(wanted[0].float()))

    as_ever = results(lambda x: x.detach().clone().requires_grad_())
    for found, expected in zip(results(moved), as_ever, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("taps", [1, 3])
def test_a_gradient_can_be_mapped_with_a_shared_bias(taps):
    adapter, (scores, bias, parameters), wanted = given(4, 8, taps=taps)

    def of_formula(p, x, y):
        return (functional_call(adapter, p, (x, bias[0])) * y).sum()

    def of_kernel(p, x, y):
        return (kernel(x, bias[0].float(), p) * y).sum()

    expected = vmap(grad(of_formula))(parameters, scores, wanted)
    single = {name: p.float() for name, p in parameters.items()}
    found = vmap(grad(of_kernel))(single, scores.float(), wanted.float())
    for name, truth in expected.items():
        torch.testing.assert_close(found[name].double(), truth, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("lead", [(), (BATCH,)], ids=["shared", "batched"])
def test_a_module_whose_calls_are_served_is_the_formula(lead, residual, monkeypatch):
    monkeypatch.setattr(heads, "serves", lambda scores: True)
    module = heads.Heads(3, 10, residual=residual)
    scores, bias = torch.randn(BATCH, 3, ROWS, KEYS), torch.randn(*lead, 3, ROWS, KEYS)
    expected = DAPE.forward(copy.deepcopy(module).double(), scores.double(), bias.double())
    torch.testing.assert_close(module(scores, bias).double(), expected, atol=2e-6, rtol=2e-6)


def test_models_may_share_scores():
    adapter, (scores, bias, parameters), wanted = given(4, 8)
    exact, single = (
        learning(scores[0], bias, parameters, dtype) for dtype in (torch.float64, torch.float32)
    )

    def formula(bias, parameters):
        return functional_call(adapter, parameters, (exact[0], bias))

    def fused(bias, parameters):
        return kernel(single[0], bias, parameters)

    expected, found = vmap(formula)(*exact[1:]), vmap(fused)(*single[1:])
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-6)
    (truth,) = torch.autograd.grad(expected, exact[:1], wanted)
    (own,) = torch.autograd.grad(found, single[:1], wanted.float())
    torch.testing.assert_close(own.double(), truth, atol=2e-6, rtol=2e-6)


def test_kernels_serve_one_formula_of_small_size():
    assert heads.served(DAPE(8, hidden=64)) and not heads.served(None)
    assert heads.served(DAPE(4, kernel_size=3)) and not heads.served(DAPE(4, kernel_size=5))
    assert not heads.served(DAPE(4, inputs="sum"))
    assert not heads.served(DAPE(16)) and not heads.served(DAPE(4, hidden=65))
    assert not heads.serves(torch.zeros(1))  # on a CPU
