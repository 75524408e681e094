"""What the CUDA kernels compute, against the float64 textbook, on a CPU: `emulated.h` runs them."""

from dataclasses import replace
from types import SimpleNamespace

import one_band
import pytest
import torch
from emulated_calls import (
    MARKS,
    check,
    check_large_sums,
    check_repeats,
    drawn,
    relative,
    tables_of,
    textbook,
)
from problems import Problem
from problems import fused as operate
from test_fused_range import Far
from torch.testing import assert_close

from dape.attention.fused import geometry, operator, overflow, passes
from dape.attention.fused.cuda import forward, mix
from dape.attention.fused.problem import Result
from dape.attention.fused.terms import Mixed
from dape.positions.bias import Bias

pytestmark = MARKS


def problem_of(hidden=16, inputs="concat", **given):
    sizes = {"rows": 50, "keys": 50, "head_dim": 32, "value_dim": 32}
    return Problem(**sizes | given, adapter=(hidden, 1, True, inputs))


PROBLEMS = {
    "causal": problem_of(),
    "bidirectional": problem_of(causal=False, rows=45, keys=77),
    "many units": problem_of(batch=1, heads=12, kv_heads=12, hidden=32),
    "odd sizes": problem_of(heads=5, kv_heads=5, hidden=7, rows=33, keys=35, query_offset=2),
    "grouped heads, offset": problem_of(kv_heads=2, rows=40, keys=70, query_offset=30),
    "padding": problem_of(batch=3, mask="left"),
    "bidirectional padding": problem_of(mask="left", causal=False, rows=20, keys=40),
    "16 heads": problem_of(batch=1, heads=16, kv_heads=16, hidden=20),
    "25 heads": problem_of(batch=1, heads=25, kv_heads=25, hidden=32, rows=40, keys=44),
    "32 heads": problem_of(
        batch=1, heads=32, kv_heads=8, rows=35, keys=35, causal=False, mask="left"
    ),
    "64 units": problem_of(batch=1, hidden=50, rows=40, keys=40),
    "rows without keys": problem_of(query_offset=-9),
    "scores alone": problem_of(inputs="scores"),
}


def layout(problem, terms):
    heads, head_dim = problem.query.shape[1], problem.query.shape[3]
    return forward.layout(heads, head_dim, forward.padded_units(terms))


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_kind_of_call_equals_the_textbook(emulated, name):
    check(PROBLEMS[name])


@pytest.mark.parametrize("causal", [True, False])
def test_bands_segments_and_elements_change_nothing(emulated, causal, monkeypatch):
    problem = problem_of(batch=5, rows=75, keys=90, causal=causal, query_offset=15)
    monkeypatch.setattr(mix, "ROWS", 32)
    assert mix.CudaMixer.share(1, 3, 96) == (1, 3)
    monkeypatch.setattr(mix, "BLOCKS", 32)
    assert mix.CudaMixer.share(5, 3, 96) == (3, 1)
    check(problem)
    check(replace(problem, batch=1))
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 4 * 96 * 32 * 2)
    check(problem)
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 4 * 64 * 64)
    check(replace(problem, batch=1, rows=134, keys=150))


@pytest.mark.parametrize("change", [{"CHUNK = 8": "CHUNK = 4"}])
@pytest.mark.parametrize(("batch", "blocks"), [(5, 32), (1, 1024)])
def test_chunks_of_diagonals_change_nothing(emulated, batch, blocks, monkeypatch):
    """A chunk and some diagonals, for groups of elements, or for segments of a diagonal."""
    monkeypatch.setattr(mix, "ROWS", 32)
    monkeypatch.setattr(mix, "BLOCKS", blocks)
    problem = problem_of(batch=batch, rows=75, keys=140, query_offset=65)
    assert mix.CudaMixer.share(batch, 5, 75)[batch == 1] > 1
    check(problem)


def test_two_backward_passes_agree_bit_for_bit(emulated):
    check_repeats(PROBLEMS["padding"])


@pytest.mark.parametrize("masked", [False, True])
def test_the_mixer_is_what_its_terms_say(emulated, masked):
    shapes = (4, 60), (60, 16), (16, 4), (4, 16)
    terms = Mixed(*(torch.randn(shape) / 4 for shape in shapes))
    given = one_band.problem_of(terms, 4, 40, 60, 20, True, masked, torch.float16)
    mixer = passes.mixer_of(given, "cuda")
    assert isinstance(mixer, mix.CudaMixer)
    for found, true in zip(*one_band.solutions(mixer), strict=True):
        assert relative(found, true.double()) < 3e-3


def with_flag(given):
    """Return room for a result with a flag that nobody has set."""
    return Result.of(given, True)._replace(flag=torch.full((1,), 7, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", [x for x in PROBLEMS if PROBLEMS[x].query_offset >= 0 and PROBLEMS[x].heads <= 16]
)
def test_the_whole_forward_pass(emulated, name, dtype):
    problem = PROBLEMS[name]
    *tensors, seen, bias, adapter = drawn(problem)
    tensors = [x.to(dtype) for x in tensors]
    with torch.no_grad():
        how = (seen, problem.head_dim**-0.5, problem.causal, problem.query_offset)
        given = operator.problem_of(*tensors, tables_of(problem, bias, adapter), *how)
        found = with_flag(given)
        forward.forward(given, given.terms, layout(given, given.terms), found)
        out, lse, rest, flag = found
        assert not flag.any()
        doubles = [x.double() for x in (*tensors, bias, adapter)]
        exact, exact_lse = textbook(problem, *doubles[:3], seen, *doubles[3:])
    assert relative(out, exact) < {torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert relative(out.double() + rest, exact) < 1e-3
    assert_close(lse.double(), exact_lse, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("size", "level", "scale", "weight", "asks"),
    [
        *((1, 0, 1, 1, 0), (30, 0, 1, 1, 1), (1, -200, 1, 1, 1), (1, 0, 0, 1, 1)),
        *((1, 0, 1e-6, 1, 1), (0, 0, 1, 1e4, 1), (0, 0, 1, 10, 0)),
    ],
)
def test_the_whole_forward_pass_says_what_16_bits_do_not_hold(
    emulated, size, level, scale, weight, asks
):
    """Weights over a scale of zero are NaN, and weights over a scale of 1e-6 infinite."""
    problem = problem_of(batch=1, rows=20, keys=20)
    query, key, value, _, bias, adapter = drawn(problem)
    tensors = [x.half() for x in (size * query, key, value)]
    with torch.no_grad():
        adapter.weight_in.mul_(weight)
        static, *others = tables_of(problem, bias, adapter)
        tables = (static + level, *others)
        given = operator.problem_of(*tensors, tables, None, scale * 32**-0.5, True, 0)
        found = with_flag(given)
        forward.forward(given, given.terms, layout(given, given.terms), found)
        assert found.flag.item() == asks


@pytest.mark.parametrize(
    ("scale", "served"), [(0.1, True), (-0.1, True), (1e-3, False), (0.0, False)]
)
def test_small_scales_are_left_to_the_bands(monkeypatch, scale, served):
    """A scale of 1e-3 lets scores of 64 through whose product of queries and keys is 64,000."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: forward.CAPABILITY)
    of_an_h100 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: of_an_h100)
    problem = problem_of(batch=8, rows=64, keys=64)
    *tensors, _, bias, adapter = drawn(problem)
    halves, tables = [x.half() for x in tensors], tables_of(problem, bias, adapter)
    given = operator.problem_of(*halves, tables, None, scale, True, 0)
    assert (forward.layout_of(given, given.terms) is not None) == served


@pytest.mark.parametrize("whole", [False, True])
def test_large_scores_and_biases_go_over_to_the_wide_range(emulated, monkeypatch, whole):
    """Tables of 3e5 on the way, and what the narrow kernels leave is not taken."""
    if whole:
        monkeypatch.setattr(forward, "layout_of", layout)
    monkeypatch.setattr(overflow, "LARGEST_SCORE", -1.0)
    check(PROBLEMS["causal"])


class Cliff(Bias):
    """A bias that falls to -1e5 and more past some distance."""

    relative = True

    def __init__(self, heads):
        super().__init__(heads)
        self.slope = torch.nn.Parameter(torch.rand(heads))

    def forward(self, query_positions, key_positions):
        delta = (query_positions[:, None] - key_positions).abs().to(self.slope.dtype)
        return -self.slope[:, None, None] * delta - 4e3 * (delta - 8).clamp(min=0)


def test_a_bias_of_1e5_stays_in_16_bits_where_it_has_no_weight(emulated):
    """Hidden units of 1e4 and more are no reason for the wide range, and leave no trace."""
    problem = problem_of(batch=1, rows=40, keys=40)
    *tensors, _, adapter = drawn(problem)
    with torch.no_grad():
        adapter.weight_out.mul_(0.02)
        tables = tables_of(problem, bias := Cliff(4), adapter)
        assert tables[1].abs().max() > 1e4
        how = (32**-0.5, True, 0, "cuda", True)
        halves = [x.half() for x in tensors[:3]]
        assert not operate(*halves, tables, None, *how)[3].any()
    check(problem, (*tensors, bias, adapter))


@pytest.mark.parametrize("whole", [False, True])
def test_large_sums_leave_16_bits_where_weights_learn_alone(emulated, monkeypatch, whole):
    if whole:
        monkeypatch.setattr(forward, "layout_of", layout)
    *given, _, adapter = drawn(PROBLEMS["causal"])
    check_large_sums(PROBLEMS["causal"], (*given, Far(4, 2e3, 1.0), adapter))


def test_gradients_behind_the_whole_forward_pass(emulated, monkeypatch):
    monkeypatch.setattr(forward, "layout_of", layout)
    check(PROBLEMS["many units"])


@pytest.mark.parametrize(
    "change", [{"    wait<STAGES - 1>();\n": ""}, {"turn(dz[n].x)": "dz[n].x"}]
)
def test_a_wrong_kernel_is_noticed(emulated):
    with pytest.raises(AssertionError):
        check(PROBLEMS["causal"])
