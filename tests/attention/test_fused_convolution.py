"""DAPE V2, convolutions along the keys, in the fused kernels, against the textbook."""

from dataclasses import replace

import pytest
import torch
from problems import Problem, close, drawn, solve

import dape
from dape.attention import cuda, triton
from dape.attention.call import Call
from dape.attention.fused import geometry, operator
from dape.attention.fused.mixers import mixer, taps

# The interpreter's own warnings, of NumPy.
pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
V2 = (5, 3, True, "concat")
PROBLEMS = {
    "causal": Problem(batch=1, rows=37, keys=37),
    "bidirectional": Problem(rows=20, keys=20, causal=False),
    "cross lengths": Problem(rows=5, keys=19, causal=False),
    "grouped heads": Problem(kv_heads=2, rows=18, keys=18),
    "heads no power of two": Problem(heads=5, kv_heads=1, rows=18, keys=18),
    "offset": Problem(rows=7, keys=20, query_offset=13),
    "more queries than keys": Problem(rows=21, keys=5),
    "rows without keys": Problem(query_offset=-3),
    "one query": Problem(batch=1, rows=1, keys=70, query_offset=69),
    "two keys": Problem(rows=2, keys=2),
    "left padding": Problem(rows=18, keys=18, mask="left"),
    "right padding": Problem(rows=18, keys=18, mask="right", causal=False),
    "mask of one row": Problem(rows=18, keys=18, mask="keys"),
    "no bias": Problem(rows=9, keys=9, bias=None),
}


@pytest.fixture
def narrow_bands(monkeypatch):
    """Let the scratches hold few numbers, and programs few rows: several bands, and segments."""
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 9 * 64 * 64)
    monkeypatch.setattr(mixer, "ROWS", 16)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_kind_of_call_equals_the_textbook(name):
    close(replace(PROBLEMS[name], adapter=V2))


@pytest.mark.parametrize("kernel_size", [5, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_wider_kernels_equal_the_textbook(kernel_size, causal):
    adapter = (5, kernel_size, True, "concat")
    close(Problem(batch=1, rows=20, keys=20, causal=causal, mask="left", adapter=adapter))


@pytest.mark.parametrize("inputs", ["concat", "sum", "bias", "scores"])
@pytest.mark.parametrize("residual", [True, False])
def test_every_form_equals_the_textbook(inputs, residual):
    close(Problem(batch=1, rows=18, keys=18, adapter=(4, 3, residual, inputs), bias="alibi"))


def test_many_hidden_units_take_another_tile():
    problem = Problem(batch=1, rows=18, keys=18, adapter=(20, 3, True, "concat"))
    tensors, modules = problem.tensors(torch.float32), problem.modules()
    tables = operator.tables(*modules, 4, 18, tensors[0].device)
    given = operator.problem_of(*tensors, tables, None, 1.0, True, 0)
    assert taps.tile_of(given, given.terms) == taps.SMALL_TILE
    close(problem)


@pytest.mark.parametrize("causal", [True, False])
def test_bands_change_nothing(narrow_bands, causal):
    close(Problem(rows=70, keys=90, causal=causal, query_offset=21, adapter=V2, mask="left"))


def test_half_precision_is_as_exact_as_its_digits():
    close(Problem(rows=20, keys=20, adapter=V2), dtype=torch.float16, tolerance=5e-3, least=1.0)


def test_two_backward_passes_agree_bit_for_bit(narrow_bands):
    problem = Problem(rows=40, keys=40, adapter=V2)
    given = drawn(problem)
    runs = [solve(problem, *given, "triton", torch.float32)[1] for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_cuda_backend_serves_what_triton_does(dtype):
    query = torch.zeros(1, 12, 3, 8, dtype=dtype)
    adapter = dape.DAPE(12, kernel_size=3)
    call = Call(query, query, query, dape.Kerple(12), adapter)
    for backend in (cuda, triton):
        assert backend.obstacle(call) is None
