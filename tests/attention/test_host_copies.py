"""No call copies from the host or waits for the device: a CUDA graph holds neither.

Calls run on PyTorch's device `meta`, where tensors have no numbers. A look at a number is an error
there. Copies between devices, and tensors made of numbers of Python, are noted.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dape
from dape.attention import select
from dape.attention.call import checked
from dape.positions.scheme import BASES, PLACES, names, resolve

pytestmark = pytest.mark.unhooked
DIMENSIONS = {"num_heads": 4, "head_dim": 16, "hidden_size": 64, "train_length": 32}
FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor}


class Made(TorchFunctionMode):
    """Notes tensors made of numbers of Python."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in FROM_NUMBERS:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Moved(TorchDispatchMode):
    """Notes operations on several devices."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if len({x.device.type for x in tensors}) > 1:
            self.found.append(str(operation))
        return result


@contextmanager
def noted():
    """Return a list of what needs the host, filled in the block."""
    found = []
    with Made(found), Moved(found):
        yield found


def built(name):
    """Return the modules of a scheme by place, on `meta`."""
    scheme = resolve(name)
    modules = {place: scheme.build(place, DIMENSIONS, {}) for place in PLACES}
    return {place: module and module.to("meta") for place, module in modules.items()}


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """PyTorch knows no autocast for `meta`."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def drawn(*shape):
    return torch.empty(shape, device="meta", requires_grad=True)


def test_every_way_to_the_host_is_noted():
    x = drawn(3).detach()
    for call, name in (
        (lambda: torch.tensor([1.0], device="meta"), "tensor"),
        (lambda: torch.zeros(3).to("meta"), "aten._to_copy.default"),
        (lambda: x.copy_(torch.zeros(3)), "aten.copy_.default"),
        (lambda: x[torch.zeros(1, dtype=torch.long)], "aten.index.Tensor"),
    ):
        with noted() as found:
            call()
        assert found == [name]
    for call in (x.sum().item, x.tolist, (x > 0).nonzero, (x > 0).sum().__bool__):
        with noted(), pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            call()


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_attention_takes_nothing_from_the_host(name, backend):
    parts = built(name)
    bias, adapter = parts["bias"], parts["adapter"]
    for rows in (40, 1):
        tensors = [drawn(1, 4, n, 16) for n in (rows, 40, 40)]
        call = checked(*tensors, bias, adapter)
        if select.BACKENDS[backend].module.obstacle(call) is not None:
            return
        with noted() as found:
            out = dape.attention(*tensors, bias, adapter, query_offset=40 - rows, backend=backend)
            out.sum().backward()
        assert found == []
        assert all(x.grad is not None for x in tensors)


@pytest.mark.parametrize("name", [name for name in BASES if name != "learned"])
def test_embeddings_and_rotations_take_nothing_from_the_host(name):
    """A learned embedding looks at positions outside of training, as documented."""
    parts, positions = built(name), torch.arange(40, device="meta")
    with noted() as found:
        if parts["embedding"] is not None:
            parts["embedding"](drawn(2, 40, 64), positions).sum().backward()
        if parts["rotation"] is not None:
            query, key = parts["rotation"](drawn(2, 4, 40, 16), drawn(2, 4, 40, 16), positions)
            (query * key).sum().backward()
    assert found == []
