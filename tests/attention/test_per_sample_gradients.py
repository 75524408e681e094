"""Transforms of `torch.func`, over one block of query rows and over several."""

import pytest
import torch
from problems import blocks_of
from torch.func import functional_call, grad, jacrev, vmap
from torch.testing import assert_close

import dape
from dape.errors import UserError

ADAPTERS = {"dape": dape.DAPE(4, 5).double(), "dape3": dape.DAPE(4, 5, kernel_size=3).double()}


class Layer(torch.nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.bias, self.adapter = dape.Kerple(4).double(), adapter

    def forward(self, *qkv):
        return dape.attention(*qkv, self.bias, self.adapter, backend="chunked")


@pytest.mark.parametrize("scores", [10**6, 100], ids=["one block", "several"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_per_sample_gradients_are_those_of_each_sample(name, scores):
    layer = Layer(ADAPTERS[name])
    parameters, qkv = dict(layer.named_parameters()), torch.randn(3, 5, 4, 13, 8).double()

    def loss(parameters, *sample):
        return functional_call(layer, parameters, tuple(x[None] for x in sample)).square().sum()

    with blocks_of(scores):
        found = vmap(grad(loss), (None, 0, 0, 0))(parameters, *qkv)
    for n in range(5):
        alone = layer(*qkv[:, n : n + 1]).square().sum()
        for ours, theirs in zip(
            found.values(), torch.autograd.grad(alone, list(parameters.values())), strict=True
        ):
            assert_close(ours[n], theirs, rtol=1e-10, atol=1e-10)


def test_jacobians_over_several_blocks_are_those_of_one():
    layer, qkv = Layer(ADAPTERS["dape"]), torch.randn(3, 1, 4, 7, 3).double()
    whole = jacrev(layer, (0, 1, 2))(*qkv)
    with blocks_of(40):
        parts = jacrev(layer, (0, 1, 2))(*qkv)
    for ours, theirs in zip(parts, whole, strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "of"), [("dape", ""), ("dape3", ""), ("dape", "bias.")])
def test_gradients_are_those_of_lent_parameters(name, of):
    """Blocks are computed again in the backward pass, when the parameters are taken back."""
    layer, qkv = Layer(ADAPTERS[name]), torch.randn(3, 2, 4, 13, 8).double()
    lent = {
        key: (value + torch.randn_like(value)).detach().requires_grad_()
        for key, value in layer.named_parameters()
        if key.startswith(of)
    }

    def gradients():
        loss = functional_call(layer, lent, tuple(qkv)).square().sum()
        return torch.autograd.grad(loss, list(lent.values()))

    whole = gradients()
    with blocks_of(100):
        parts = gradients()
    for ours, theirs in zip(parts, whole, strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("at", ["query", "mask"])
def test_tensors_overwritten_before_the_backward_pass_are_refused(at):
    query, key, value = torch.randn(3, 2, 4, 13, 8).double()
    given = {"query": query.requires_grad_() * 1, "mask": torch.ones(2, 13, dtype=torch.bool)}
    with blocks_of(100):
        out = dape.attention(key=key, value=value, bias=dape.Kerple(4), **given)
        given[at][:, 0] = 0
        with pytest.raises(UserError, match="overwritten before the backward pass") as error:
            out.sum().backward()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("modules", [{"bias": dape.Kerple(4)}, {"adapter": dape.DAPE(4)}])
def test_parameters_overwritten_before_the_backward_pass_are_refused(modules):
    """Gradients were those of the new parameters, where PyTorch refuses."""
    query, key, value = torch.randn(3, 2, 4, 13, 8).requires_grad_()
    parameters = [p for module in modules.values() for p in module.parameters()]
    with blocks_of(100):
        out = dape.attention(query, key, value, **modules)
        out.sum().backward()
        torch.optim.SGD(parameters, lr=0.1).step()  # after the backward pass
        out = dape.attention(query, key, value, **modules)
        torch.optim.SGD(parameters, lr=0.1).step()
        with pytest.raises(UserError, match="a parameter of its bias or adapter, was overwritten"):
            out.sum().backward()
