"""Decoding, few queries against many keys, against the float64 textbook."""

from dataclasses import replace

import pytest
import torch
from problems import Problem, close, fused
from torch.testing import assert_close

import dape
from dape.attention.fused import decode, operator, passes
from dape.attention.fused.problem import Problem as FusedProblem
from dape.attention.fused.terms import Mixed
from dape.bench.case import Parts
from dape.bench.parity import eager

# The interpreter's own warnings, of NumPy.
pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
BASE = Problem(rows=1, keys=70, query_offset=69, adapter=(5, 1, True, "concat"))
PROBLEMS = {
    "one query": BASE,
    "several queries": replace(BASE, rows=4, query_offset=66),
    "a number of queries that is no power of two": replace(BASE, rows=3, query_offset=67),
    "queries in several tiles": replace(BASE, rows=7, keys=130, query_offset=123),
    "bidirectional": replace(BASE, rows=2, causal=False, query_offset=30),
    "keys nobody sees": replace(BASE, rows=2, keys=150, query_offset=20),
    "a span nobody of a tile sees": replace(BASE, rows=6, keys=100, query_offset=61),
    "past the keys": replace(BASE, rows=2, query_offset=90),
    "behind the keys": replace(BASE, causal=False, query_offset=100),
    "before the keys": replace(BASE, rows=2, causal=False, query_offset=-9),
    "rows without keys": replace(BASE, rows=4, query_offset=-2),
    "no key for any row": replace(BASE, rows=2, query_offset=-5),
    "one key": replace(BASE, keys=20, query_offset=0),
    "grouped heads": replace(BASE, rows=2, kv_heads=2, query_offset=68),
    "one key head": replace(BASE, heads=5, kv_heads=1),
    "one head": replace(BASE, heads=1, kv_heads=1),
    "25 heads": replace(BASE, batch=1, heads=25, kv_heads=25, rows=3, query_offset=67),
    "32 heads of 128 numbers": replace(
        BASE, batch=1, heads=32, kv_heads=8, head_dim=128, value_dim=128
    ),
    "64 hidden units": replace(BASE, adapter=(64, 1, True, "concat")),
    "wider values": replace(BASE, value_dim=20),
    "narrower values": replace(BASE, head_dim=32, value_dim=6),
    "left padding": replace(BASE, mask="left"),
    "right padding": replace(BASE, rows=2, mask="right", causal=False),
    "mask of one row": replace(BASE, mask="keys"),
    "scale": replace(BASE, scale=0.3),
    "no bias": replace(BASE, bias=None),
    "alibi, no residual": replace(BASE, bias="alibi", adapter=(4, 1, False, "sum")),
    "scores alone": replace(BASE, adapter=(4, 1, True, "scores")),
}


@pytest.fixture
def calls(monkeypatch):
    """Return the list of problems that decoding served."""
    served, forward = [], decode.forward

    def spied(problem, *others):
        served.append(problem)
        return forward(problem, *others)

    monkeypatch.setattr(decode, "forward", spied)
    return served


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_kind_of_call_equals_the_textbook(name, calls):
    close(PROBLEMS[name])
    assert len(calls) == 1


@pytest.mark.parametrize("size", [32, 64, 80, 96, 128])
def test_every_head_dimension(size, calls):
    close(replace(BASE, batch=1, head_dim=size, value_dim=size))
    assert len(calls) == 1


def test_half_precision_is_as_exact_as_its_digits(calls):
    close(replace(BASE, rows=2, query_offset=68), dtype=torch.float16, tolerance=5e-3, least=1.0)
    assert len(calls) == 1


@pytest.mark.parametrize("programs", [1, 5, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_spans_change_nothing(monkeypatch, programs, causal, calls):
    monkeypatch.setattr(decode, "PROGRAMS", programs)
    close(replace(BASE, batch=1, rows=2, keys=300, query_offset=280, causal=causal, mask="left"))
    assert len(calls) == 1


def test_log_sum_exp_is_that_of_the_other_path(monkeypatch):
    problem = replace(BASE, rows=3, keys=200, query_offset=150, mask="left")
    tensors, (bias, adapter) = problem.tensors(torch.float32), problem.modules()
    found = operator.tables(bias, adapter, problem.heads, 200, tensors[0].device)
    rest = (problem.draw_mask(), 0.5, True, 150, "triton", False)
    ours = fused(*tensors, found, *rest)
    monkeypatch.setattr(decode, "serves", lambda problem: False)
    for x, y in zip(ours, fused(*tensors, found, *rest), strict=True):
        assert_close(x, y)


def test_a_row_that_sees_nothing_has_zeros_and_minus_infinity():
    query, key, value = replace(BASE, rows=4).tensors(torch.float32)
    found = operator.tables(*BASE.modules(), 4, 80, query.device)
    out, lse, *_ = fused(query, key, value, found, None, 0.5, True, -2, "triton", False)
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == -torch.inf).all()
    assert lse[:, :, 2:].isfinite().all()


def test_decoding_token_by_token_equals_one_pass(calls):
    tensors = replace(BASE, batch=1, rows=50, keys=50).tensors(torch.float32)
    query, key, value = tensors
    modules = dict(zip(("bias", "adapter"), BASE.modules(), strict=True))
    whole = dape.attention(*tensors, **modules, backend="triton")
    assert not calls
    for n in range(16, 50, 11):
        cached = (query[:, :, n : n + 1], key[:, :, : n + 1], value[:, :, : n + 1])
        one = dape.attention(*cached, **modules, query_offset=n, backend="triton")
        assert_close(one, whole[:, :, n : n + 1])
    assert len(calls) == 4


def test_few_keys_or_many_queries_are_left_to_the_other_path():
    for rows, keys in ((17, 600), (2, 31)):
        tensors = replace(BASE, rows=rows, keys=keys).tensors(torch.float32)
        assert not decode.serves(FusedProblem(*tensors, mixing(), None, 1.0, True, 0))


def mixing():
    return Mixed(torch.zeros(4, 91), torch.zeros(91, 5), torch.zeros(5, 4), torch.zeros(4, 5))


@pytest.mark.parametrize(("heads", "units"), [(16, 48), (16, 64), (64, 16), (16, 32), (4, 17)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_warp_repeats_the_products_of_another(heads, units, dtype):
    """On Hopper a warp takes 16 of 64 rows of heads or units; below 64, warps share columns."""
    query, key, value = (torch.zeros(1, heads, n, 64, dtype=dtype) for n in (8, 300, 300))
    problem = FusedProblem(query, key, value, None, None, 1.0, True, 292)
    tile = decode.tile_of(problem, heads, units)
    rows = max(heads, decode.padded(units))
    assert 16 * tile.num_warps <= rows if rows >= 64 else tile.num_warps == 8


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (3, 1), (1, 3), (1, 16), (64, 1)])
@pytest.mark.parametrize("size", [64, 128])
def test_spans_fill_the_gpu_and_cover_the_keys(batch, rows, size):
    query, cache = torch.empty(batch, 12, rows, size), torch.empty(1, 1, 1, 1)
    cache = cache.expand(batch, 12, 32768, size)
    problem = FusedProblem(query, cache, cache, mixing(), None, 1.0, True, 32768 - rows)
    tile = decode.tile_of(problem, 16, 32)
    spans, length = decode.key_spans(problem, tile)
    assert spans * length >= 32768 and spans * size <= decode.MOST_PARTS
    assert spans * batch * rows >= 128


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bias", [dape.Kerple, dape.FIRE])
def test_on_a_gpu_against_chunked_in_float64(backend, rows, bias, calls):
    tensors = [
        torch.randn(4, 12, length, 64, device="cuda", dtype=torch.bfloat16)
        for length in (rows, 4099, 4099)
    ]
    modules = (bias(12).cuda(), dape.DAPE(12).cuda())
    offset = 4099 - rows
    found = dape.attention(*tensors, *modules, query_offset=offset, backend=backend).double()
    assert len(calls) == 1
    textbook = eager(Parts(*modules), *tensors, offset).double()
    doubles = [x.double() for x in (*tensors, *modules)]
    true = dape.attention(*doubles, query_offset=offset, backend="reference")
    assert (found - true).norm() <= (textbook - true).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("most_bands", [0, passes.MOST_BANDS])
@pytest.mark.parametrize("units", [32, 48, 64])
def test_on_a_gpu_the_wide_way_reads_rows_that_begin_anywhere(
    units, most_bands, calls, monkeypatch
):
    """Eight warps read other memory behind 64 hidden units; `tile_of` says how."""
    monkeypatch.setattr(passes, "MOST_BANDS", most_bands)
    sizes = ((8, 151, 64), (4, 451, 64), (4, 451, 32))
    tensors = [
        torch.randn(1, heads, length + 3, size + 5, device="cuda").bfloat16()[:, :, 1:-2, 3:-2]
        for heads, length, size in sizes
    ]
    tensors[0] = 30 * tensors[0]  # scores of the wide way
    tensors[0] = torch.nn.functional.pad(tensors[0], (3, 2))[..., 3:-2]
    modules = (dape.T5(8).cuda(), dape.DAPE(8, units).cuda())
    found = dape.attention(*tensors, *modules, query_offset=300, backend="cuda").double()
    assert len(calls) == (most_bands == 0)
    alike = (tensors[0], *(x.repeat_interleave(2, dim=1) for x in tensors[1:]))
    textbook = eager(Parts(*modules), *alike, 300).double()
    doubles = [x.double() for x in (*tensors, *modules)]
    true = dape.attention(*doubles, query_offset=300, backend="reference")
    assert (found - true).norm() <= (textbook - true).norm()
