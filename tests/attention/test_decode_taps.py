"""Few queries against many keys with convolutions along the keys, against the float64 textbook."""

from dataclasses import replace

import pytest
import torch
from problems import Problem, close, fused
from test_decode import PROBLEMS
from test_fused_range import Far, solved
from torch.testing import assert_close

import dape
from dape.attention.fused import operator, passes, windows
from dape.attention.fused.mixers.taps_rows import TapsRowsMixer
from dape.bench.case import Parts
from dape.bench.parity import eager

# The interpreter's own warnings, of NumPy.
pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
BASE = Problem(rows=1, keys=150, query_offset=149, adapter=(5, 3, True, "concat"))
SERVED = {
    name: replace(problem, adapter=(problem.adapter[0], 3, *problem.adapter[2:]))
    for name, problem in PROBLEMS.items()
    if problem.adapter[0] < 64  # more channels than the kernels serve
} | {
    "several tiles": BASE,
    "several tiles, left padding": replace(BASE, rows=3, query_offset=146, mask="left"),
    "five taps": replace(BASE, rows=2, query_offset=148, adapter=(5, 5, True, "concat")),
}


@pytest.fixture
def mixers(monkeypatch):
    """Return the list of mixers whose bands were computed forward."""
    found, forward = [], passes.forward_by_bands

    def spied(mixer, *others):
        found.append(mixer)
        return forward(mixer, *others)

    monkeypatch.setattr(passes, "forward_by_bands", spied)
    return found


@pytest.mark.parametrize("name", SERVED)
def test_every_kind_of_call_equals_the_textbook(name, mixers):
    close(SERVED[name])
    assert [type(each) for each in mixers] == [TapsRowsMixer]


def test_half_precision_is_as_exact_as_its_digits(mixers):
    close(replace(BASE, rows=2, query_offset=148), dtype=torch.float16, tolerance=5e-3, least=1.0)
    assert [type(each) for each in mixers] == [TapsRowsMixer]


def test_as_many_rows_as_a_tile_in_cuda_are_left_to_the_other_mixers(mixers):
    for rows in (windows.ROWS - 1, windows.ROWS):
        given = replace(BASE, batch=1, rows=rows, query_offset=150 - rows)
        tensors, (bias, adapter) = given.tensors(torch.float32), given.modules()
        dape.attention(*tensors, bias, adapter, query_offset=150 - rows, backend="triton")
    assert [type(each) is TapsRowsMixer for each in mixers] == [True, False]


@pytest.mark.parametrize("slope", [3.0, 1e4])
def test_large_biases_are_no_worse_than_in_float32(slope, mixers):
    """float32 itself holds 1e5 to 0.008: what the textbook in float32 loses is the yardstick."""
    given = replace(BASE, rows=2, keys=40, query_offset=38, head_dim=8, value_dim=8)
    tensors = given.tensors(torch.float16)
    parts = Far(4, 1e5, slope), given.modules()[1]
    exact = solved(tensors, *parts, "reference", torch.float64)
    found = solved(tensors, *parts, "triton", torch.float16)
    floats = solved([x.float() for x in tensors], *parts, "reference", torch.float32)
    assert type(mixers[0]) is TapsRowsMixer
    for ours, theirs, true in zip(found, floats, exact, strict=True):
        size = true.norm() + 1e-2
        error, yardstick = ((x.double() - true).norm() / size for x in (ours, theirs))
        assert error <= 5e-3 + 4 * yardstick


@pytest.mark.parametrize(("dtype", "flag"), [(torch.float16, [1]), (torch.float32, [])])
def test_the_flag_asks_for_a_backward_pass_in_float32(dtype, flag):
    tensors, modules = BASE.tensors(dtype), BASE.modules()
    found = operator.tables(*modules, BASE.heads, 150, tensors[0].device)
    assert fused(*tensors, found, None, 0.5, True, 149, "triton", False)[3].tolist() == flag


def test_decoding_token_by_token_equals_one_pass(mixers):
    query, key, value = replace(BASE, batch=1, rows=80, keys=80).tensors(torch.float32)
    modules = dict(zip(("bias", "adapter"), BASE.modules(), strict=True))
    whole = dape.attention(query, key, value, **modules, backend="triton")
    for n in range(16, 80, 21):
        cached = (query[:, :, n : n + 1], key[:, :, : n + 1], value[:, :, : n + 1])
        one = dape.attention(*cached, **modules, query_offset=n, backend="triton")
        assert_close(one, whole[:, :, n : n + 1])
    assert [type(each) is TapsRowsMixer for each in mixers] == [False, True, True, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bias", [dape.Kerple, dape.ALiBi])
def test_on_a_gpu_against_float64(rows, bias, mixers):
    tensors = [
        torch.randn(2, 12, length, 64, device="cuda", dtype=torch.bfloat16)
        for length in (rows, 4099, 4099)
    ]
    modules = (bias(12).cuda(), dape.DAPE(12, kernel_size=3).cuda())
    offset = 4099 - rows
    found = dape.attention(*tensors, *modules, query_offset=offset, backend="cuda").double()
    assert [type(each) for each in mixers] == [TapsRowsMixer]
    textbook = eager(Parts(*modules), *tensors, offset).double()
    doubles = [x.double() for x in (*tensors, *modules)]
    true = dape.attention(*doubles, query_offset=offset, backend="reference")
    assert (found - true).norm() <= (textbook - true).norm()
