"""Gradients of the kernels in fp16 where rounding would change them whole, against float64."""

import copy

import pytest
import torch

import dape

pytestmark = [
    pytest.mark.unhooked,
    # The interpreter's own warnings, of NumPy.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
HEADS, LENGTH, SIZE = 2, 40, 16


def gradients(tensors, modules, backend, dtype, **options):
    """Return the gradients of queries, keys, values and parameters."""
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    if dtype == torch.float64:
        modules = [m and copy.deepcopy(m).double() for m in modules]
    parameters = [p for m in modules if m is not None for p in m.parameters()]
    out = dape.attention(*tensors, *modules, backend=backend, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).half()
    return torch.autograd.grad(out, [*tensors, *parameters], weight.to(dtype), allow_unused=True)


def errors(tensors, modules, **options):
    """Return the relative errors of the gradients of queries, keys and values."""
    found = gradients(tensors, modules, "triton", torch.float16, **options)
    exact = gradients(tensors, modules, "reference", torch.float64, **options)
    pairs = zip(found[:3], exact[:3], strict=True)
    return [((mine.double() - true).norm() / true.norm()).item() for mine, true in pairs]


def one_unit(adapter, on_scores, at_zero):
    """Let a single hidden unit see the first head's score, and be a little below zero."""
    middle = adapter.kernel_size // 2
    with torch.no_grad():
        adapter.weight_in.zero_()
        adapter.weight_in[0, 0, middle] = on_scores
        adapter.bias_in.fill_(at_zero - 1e-5)
        adapter.weight_out.zero_()
        adapter.weight_out[:, 0, middle] = 2.0
        adapter.bias_out.zero_()
    return adapter


@pytest.mark.parametrize("name", ["dape", "fire", "dape3"])
def test_the_rounding_of_the_first_layer_turns_no_hidden_unit(name):
    """0.3 is 0.30005 in fp16, which would bring every unit above zero, and its gradient with it."""
    taps = 3 if name == "dape3" else 1
    adapter = one_unit(dape.DAPE(HEADS, 1, taps, inputs="scores"), 0.3, -0.3)
    bias = dape.FIRE(HEADS, hidden=3) if name == "fire" else None
    query, key, value = torch.randn(3, 1, HEADS, LENGTH, SIZE)
    query.zero_()[..., 0] = key[..., 0] = 1.0  # every score is one
    assert max(errors((query, key, value), (bias, adapter), scale=1.0)) < 3e-3


def test_the_rounding_of_features_turns_no_hidden_unit():
    adapter = one_unit(dape.DAPE(HEADS, 1), 1.0, -0.3)
    bias = dape.FIRE(HEADS, hidden=1)
    with torch.no_grad():  # the feature is 0.3 everywhere, and so is B of the first head
        bias.weight_in.zero_()
        bias.bias_in.fill_(0.3)
        bias.weight_out.copy_(torch.tensor([[1.0], [0.5]]))
        bias.bias_out.zero_()
        adapter.weight_in[0, HEADS] = 1.0
    query, key, value = torch.randn(3, 1, HEADS, LENGTH, SIZE)
    assert max(errors((torch.zeros_like(query), key, value), (bias, adapter))[::2]) < 3e-3


SCHEMES = {
    "dape": lambda: (dape.KerplePower(HEADS), dape.DAPE(HEADS, 7, residual=False)),
    "fire": lambda: (dape.FIRE(HEADS), dape.DAPE(HEADS, 7)),
    "dape3": lambda: (dape.KerplePower(HEADS), dape.DAPE(HEADS, 7, 3)),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_of_one_key_have_no_gradient(name):
    """P is one, so that dP = delta: rounded for itself, dP would leave a part of 2^-12 of both."""
    modules = SCHEMES[name]()
    query, key, value = torch.randn(3, 3, HEADS, 1, SIZE)
    of_query, of_key, _, *others = gradients(
        (query, key, 30 * value), modules, "triton", torch.float16
    )
    assert all(x.abs().max() < 1e-3 for x in (of_query, of_key, *others) if x is not None)
