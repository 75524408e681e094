"""What the CUDA kernels compute, against the float64 textbook, on a CPU: `emulated.h` runs them."""

import copy
import shutil
from dataclasses import dataclass, replace

import emulator
import pytest
import torch
from torch.testing import assert_close

import dape
from dape.attention.fused import forward_cuda, geometry, mix_cuda, operator

pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    # The interpreter's own warnings, of NumPy: the kernels of one head are Triton's.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@dataclass(frozen=True)
class Call:
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    rows: int = 50
    keys: int = 50
    head_dim: int = 32
    hidden: int = 16
    causal: bool = True
    offset: int = 0
    masked: bool = False
    inputs: str = "concat"


CALLS = {
    "causal": Call(),
    "bidirectional": Call(causal=False, rows=45, keys=77),
    "many units": Call(batch=1, heads=12, kv_heads=12, hidden=32),
    "odd sizes": Call(heads=5, kv_heads=5, hidden=7, rows=33, keys=35, offset=2),
    "grouped heads, offset": Call(kv_heads=2, rows=40, keys=70, offset=30),
    "padding": Call(batch=3, masked=True),
    "bidirectional padding": Call(masked=True, causal=False, rows=20, keys=40),
    "16 heads": Call(batch=1, heads=16, kv_heads=16, hidden=20),
    "25 heads": Call(batch=1, heads=25, kv_heads=25, hidden=32, rows=40, keys=44),
    "32 heads": Call(batch=1, heads=32, kv_heads=8, rows=35, keys=35, causal=False, masked=True),
    "64 units": Call(batch=1, hidden=50, rows=40, keys=40),
    "rows without keys": Call(offset=-9),
    "scores alone": Call(inputs="scores"),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def change():
    """Return changes of the sources, old to new; a test may make some."""
    return {}


def layout(problem, mixing):
    heads, head_dim = problem.query.shape[1], problem.query.shape[3]
    return forward_cuda.layout(heads, head_dim, forward_cuda.padded_units(mixing))


@pytest.fixture
def emulated(monkeypatch, folder, change):
    """Let the CUDA kernels run here, those across heads alone."""

    def compiled(module):
        def found(device, name, *values):
            source = module.source(name, *values)
            for old, new in change.items():
                source = source.replace(old, new)
            return emulator.compiled(source, name, folder)

        return found

    monkeypatch.setattr(forward_cuda, "layout_of", lambda problem, mixing: None)
    for module in (forward_cuda, mix_cuda):
        monkeypatch.setattr(module, "compiled", compiled(module))


def drawn(call):
    """Return query, key, value, the keys that are seen, the bias and the adapter."""
    query = torch.randn(call.batch, call.heads, call.rows, call.head_dim)
    key, value = torch.randn(2, call.batch, call.kv_heads, call.keys, call.head_dim)
    seen = None
    if call.masked:
        seen = torch.arange(call.keys) >= torch.randint(0, 9, (call.batch, 1))
    adapter = dape.DAPE(call.heads, hidden=call.hidden, inputs=call.inputs)
    return query, key, value, seen, dape.Kerple(call.heads), adapter


def tables_of(call, bias, adapter):
    count = max(call.keys - min(0, call.offset), call.rows + call.offset)
    return operator.tables(bias, adapter, call.heads, count, torch.device("cpu"))


def textbook(call, query, key, value, seen, bias, adapter):
    mask = None if seen is None else seen[:, None, None]
    return dape.attention(
        query, key, value, bias, adapter, mask=mask, causal=call.causal,
        query_offset=call.offset, backend="reference", return_lse=True,
    )  # fmt: skip


def solve(call):
    """Return output and gradients: the kernels' in fp16, the textbook's in float64 and bf16."""
    *tensors, seen, bias, adapter = drawn(call)
    weight = torch.randn_like(tensors[0])

    def solution(attend, dtype, bias, adapter):
        inputs = [x.to(dtype).requires_grad_() for x in tensors]
        parameters = [*bias.named_parameters(), *adapter.named_parameters()]
        used = [p for name, p in parameters if name != "bias_out"]  # whose gradient is zero
        out = attend(*inputs, bias, adapter)
        return [out, *torch.autograd.grad(out, [*inputs, *used], weight.to(dtype))]

    def fused(query, key, value, bias, adapter):
        how = (call.head_dim**-0.5, call.causal, call.offset, "cuda", True)
        return operator.banded(query, key, value, tables_of(call, bias, adapter), seen, *how)[0]

    def exact(query, key, value, bias, adapter):
        return textbook(call, query, key, value, seen, bias, adapter)[0]

    doubles = copy.deepcopy(bias).double(), copy.deepcopy(adapter).double()
    return (
        solution(fused, torch.float16, bias, adapter),
        solution(exact, torch.float64, *doubles),
        solution(exact, torch.bfloat16, bias, adapter),
    )


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def check(call):
    """Compare with float64, by the errors of the textbook in bf16.

    A hidden unit that is zero but for rounding has one of two slopes, which is much in gradients of
    so few keys; a wrong kernel is off by 30 times the textbook's error.
    """
    for i, (found, exact, rounded) in enumerate(zip(*solve(call), strict=True)):
        assert relative(found, exact) <= (2 if i < 4 else 4) * relative(rounded, exact)


@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_call_equals_the_textbook(emulated, name):
    check(CALLS[name])


@pytest.mark.parametrize("causal", [True, False])
def test_bands_segments_and_elements_change_nothing(emulated, causal, monkeypatch):
    call = Call(batch=5, rows=75, keys=90, causal=causal, offset=15)
    monkeypatch.setattr(mix_cuda, "ROWS", 32)
    assert mix_cuda.share(1, 3, 96) == (1, 3)
    monkeypatch.setattr(mix_cuda, "BLOCKS", 32)
    assert mix_cuda.share(5, 3, 96) == (3, 1)
    check(call)
    check(replace(call, batch=1))
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 4 * 96 * 32 * 2)
    check(call)


def test_two_backward_passes_agree_bit_for_bit(emulated):
    torch.manual_seed(0)
    first = solve(CALLS["padding"])[0]
    torch.manual_seed(0)
    for x, y in zip(first, solve(CALLS["padding"])[0], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", [x for x in CALLS if CALLS[x].offset >= 0 and CALLS[x].heads <= 16]
)
def test_the_whole_forward_pass(emulated, name, dtype):
    call = CALLS[name]
    *tensors, seen, bias, adapter = drawn(call)
    tensors = [x.to(dtype) for x in tensors]
    with torch.no_grad():
        how = (seen, call.head_dim**-0.5, call.causal, call.offset)
        given = operator.problem_of(*tensors, tables_of(call, bias, adapter), *how)
        where = layout(given, given.mixing)
        out, lse, rest = forward_cuda.forward(given, given.mixing, where, True)
        doubles = [x.double() for x in (*tensors, bias, adapter)]
        exact, exact_lse = textbook(call, *doubles[:3], seen, *doubles[3:])
    assert relative(out, exact) < {torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert relative(out.double() + rest, exact) < 1e-3
    assert_close(lse.double(), exact_lse, rtol=1e-3, atol=2e-3)


def test_gradients_behind_the_whole_forward_pass(emulated, monkeypatch):
    monkeypatch.setattr(forward_cuda, "layout_of", layout)
    check(CALLS["many units"])


@pytest.mark.parametrize(
    "change", [{"    wait<STAGES - 1>();\n": ""}, {"turn(dz[n].x)": "dz[n].x"}]
)
def test_a_wrong_kernel_is_noticed(emulated):
    with pytest.raises(AssertionError):
        check(CALLS["causal"])
