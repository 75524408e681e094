"""Plans of fused calls: what they start gives the numbers of the launchers, bit for bit."""

import ctypes
from functools import partial

import pytest
import torch

import dape
from dape.attention.fused import geometry, plan

# The interpreter's own warnings, of NumPy.
pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
PARTS = {
    "nothing": (None, None),
    "kerple": (dape.Kerple, None),
    "t5": (dape.T5, None),
    "dape-kerple": (dape.Kerple, dape.DAPE),
    "fire": (dape.FIRE, None),
    "dape-fire": (dape.FIRE, dape.DAPE),
    "dape3-kerple": (dape.Kerple, partial(dape.DAPE, hidden=5, kernel_size=3)),
}


def at(address, dtype):
    """Return a tensor of the number at an address."""
    if not address:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


@pytest.fixture
def started(monkeypatch):
    """Let plans be made and run by the interpreter; return the number of kernels of each plan."""
    found = []

    def prepared(kernel, grid, arguments, options):
        dtypes = {n: x.dtype for n, x in enumerate(arguments) if isinstance(x, plan.Pointer)}

        def run(stream, *given):
            assert stream == 7
            given = [at(x, dtypes[n]) if n in dtypes else x for n, x in enumerate(given)]
            kernel[grid](*given, **options)

        return run, [None]

    def run(self, *given):
        found.append(len(self.starts))
        return whole(self, *given)

    whole = plan.Plan.run
    monkeypatch.setattr(plan.Plan, "run", run)
    monkeypatch.setattr(plan, "prepared", prepared)
    monkeypatch.setattr(plan, "current_stream", lambda device: 7)
    monkeypatch.setattr(plan, "DEVICES", ("cpu",))
    plan.calls_of.cache_clear()
    yield found
    plan.calls_of.cache_clear()


def solve(qkv, bias, adapter, **options):
    """Return output, log-sum-exp and gradients, for heads that lie in one tensor."""
    qkv = qkv.clone().requires_grad_()
    parameters = [p for m in (bias, adapter) if m for p in m.parameters()]
    found = dape.attention(
        *qkv.unbind(2), bias, adapter, backend="triton", return_lse=True, **options
    )
    weights = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x) for x in found]
    return *found, *torch.autograd.grad(found, [qkv, *parameters], weights)


def drawn(dtype, rows=21):
    """Return Q, K and V of two elements and four heads of sixteen, side by side."""
    return torch.randn(2, 4, 3, rows, 16).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_a_plan_gives_the_numbers_of_the_launchers(name, dtype, started, monkeypatch):
    modules = [make and make(4) for make in PARTS[name]]
    inputs = [drawn(dtype) for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(plan, "DEVICES", ())
        expected = [solve(qkv, *modules) for qkv in inputs]
    for number, (qkv, theirs) in enumerate(zip(inputs, expected, strict=True)):
        for mine, other in zip(solve(qkv, *modules), theirs, strict=True):
            assert torch.equal(mine, other)
        assert bool(started) == (number > 0)  # the first call is computed without
    half = len(started) // 2
    assert started[:half] == started[half:] and min(started) > 0


@pytest.mark.parametrize("name", ["dape-kerple", "dape-fire", "dape3-kerple"])
def test_bands_have_a_plan_too(name, started, monkeypatch):
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 4 * 64 * 64)
    modules, qkv = [make(4) for make in PARTS[name]], drawn(torch.float16, rows=100)[:1]
    first, _, third = (solve(qkv, *modules) for _ in range(3))
    assert max(started) > 20
    for mine, other in zip(third, first, strict=True):
        assert torch.equal(mine, other)
