"""DAPE V2 in CUDA, on a CPU: against the formula, the textbook, and the kernels in Triton."""

from dataclasses import replace

import one_band
import pytest
import torch
from emulated_calls import (
    MARKS,
    check,
    check_large_sums,
    check_repeats,
    drawn,
    operate,
    relative,
    solve_seeded,
    tables_of,
)
from problems import Problem
from test_fused_range import Far

from dape.attention.fused import geometry, passes, plan, windows
from dape.attention.fused.cuda import taps
from dape.attention.fused.mixers.taps import TapsMixer
from dape.attention.fused.problem import Gate
from dape.attention.fused.rows import Rows
from dape.attention.fused.terms import Taps

pytestmark = MARKS


def problem_of(hidden=16, inputs="concat", **given):
    sizes = {"batch": 1, "rows": 20, "keys": 20, "head_dim": 16, "value_dim": 16}
    return Problem(**sizes | given, adapter=(hidden, 3, True, inputs))


PROBLEMS = {
    "one window": problem_of(batch=2, rows=11, keys=11),
    "several windows": problem_of(rows=16, keys=85, query_offset=64),
    "12 heads, 32 units": problem_of(heads=12, kv_heads=12, hidden=32),
    "odd sizes": problem_of(heads=5, kv_heads=1, hidden=7, rows=13, keys=61, query_offset=45),
    "scores alone": problem_of(inputs="scores", rows=9, keys=9),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_calls_equal_the_textbook(emulated, name):
    check(PROBLEMS[name])


@pytest.mark.parametrize(
    ("name", "slope"),
    [(name, slope) for name in ("one window", "several windows") for slope in (3.0, 10.0)]
    + [("one window", -5.0), ("several windows", -1.0)],
)
def test_large_biases_stay_in_16_bits(emulated, name, slope):
    problem = replace(PROBLEMS[name], batch=1)
    *tensors, seen, _, adapter = drawn(problem)
    given = *tensors, seen, Far(problem.heads, 0.0, slope), adapter
    tables = tables_of(problem, *given[4:])
    assert max(tables[0].abs().max(), tables[1].abs().max()) > 20
    how = (problem.head_dim**-0.5, True, problem.query_offset, "cuda", True)
    flag = operate(*(x.half() for x in tensors), tables, None, *how)[3]
    assert flag.tolist() == [0]
    check(problem, given)


def test_large_sums_leave_16_bits_where_weights_learn_alone(emulated):
    given = *drawn(PROBLEMS["one window"])[:4], Far(4, 2e3, 1.0), drawn(PROBLEMS["one window"])[5]
    check_large_sums(PROBLEMS["one window"], given)


def terms(heads=4, units=16, entries=100):
    sizes = (heads, entries), (entries, 3 * units), (3 * units, heads), (heads, 3 * units), (units,)
    return Taps(*(torch.randn(size) / 4 for size in sizes))


def given_problem(rows=11, keys=70, offset=59, causal=True, masked=False, dtype=torch.float16):
    """Return a problem of two elements."""
    return one_band.problem_of(terms(), 4, rows, keys, offset, causal, masked, dtype)


def check_mixer():
    """Compare with the formula, by the errors of the mixer in Triton."""
    given, errors = given_problem(), []
    for kind, backend in ((taps.CudaTapsMixer, "cuda"), (TapsMixer, "triton")):
        torch.manual_seed(1)
        mixer = passes.mixer_of(given, backend)
        assert isinstance(mixer, kind)
        found, true = one_band.solutions(mixer)
        errors.append([relative(x, y.double()) for x, y in zip(found, true, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 1.1 * theirs < 1e-2


def test_the_mixer_is_what_its_terms_say_and_as_exact_as_in_triton(emulated):
    check_mixer()


@pytest.mark.parametrize(
    ("rows", "module", "name", "value", "elements", "segments", "add"),
    [
        (10, taps, "BLOCKS", 2, 2, 1, False),
        (18, taps, "SEGMENT", 9, 1, 2, False),
        (66, geometry, "SCORES_PER_BAND", 14 * 64 * 64, 1, 1, True),
    ],
)
def test_elements_segments_and_bands_change_nothing(
    emulated, monkeypatch, rows, module, name, value, elements, segments, add
):
    shape = problem_of(batch=2, rows=rows, keys=rows + 5, query_offset=5)
    expected = solve_seeded(shape)
    monkeypatch.setattr(module, name, value)
    slots = taps.CudaTapsMixer.of(given_problem(rows, rows + 5, 5), terms()).slots()
    assert slots[1:] == (elements, segments, add)
    for found, true in zip(solve_seeded(shape), expected, strict=True):
        assert relative(found, true.double()) < 1e-3


def test_two_backward_passes_agree_bit_for_bit(emulated):
    check_repeats(PROBLEMS["one window"])


def test_a_plan_notes_all_that_several_bands_start(emulated, monkeypatch):
    """PyTorch's own operations, such as zeros, would leave the call without a plan."""
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 14 * 64 * 64)
    noted, unit = plan._Recorder(), torch.ones(())
    given = given_problem(66, 71, 5)
    mixer = passes.mixer_of(given, "cuda")
    monkeypatch.setattr(plan._current, "recorder", noted)
    with noted:
        slots = mixer.slots()
        mixer.gradients(slots, unit, given.terms)
    assert slots.add and noted.noted[0][0].__name__ == "zero_kernel"


@pytest.mark.parametrize(
    "change",
    [
        {"    wait<STAGES - 1>();\n": ""},
        {"if (column + TILES == 0) r[n][TILES] = 0;": ""},
        {": tap ? sum : sum - begin": ": sum"},
        {"if (p < HALO && t == 0) pair &= 0xffff0000u;": ""},
        {"leaky(sum - u[0])": "leaky(sum)"},
        {"if (p < 2 && (low || high))": "if (false)"},
        {"sums[1] = fmaf(first, own_begin, sums[1]);": ""},
        {"!positive(signs, n, i, e)": "false"},
    ],
)
def test_a_wrong_kernel_is_noticed(emulated):
    with pytest.raises(AssertionError):
        check_mixer()


@pytest.mark.parametrize("change", [{"if (gated": "if (false && gated"}, {}])
def test_a_backward_pass_that_is_not_wanted_does_nothing(emulated, change):
    given = given_problem(rows=8, keys=8, offset=0)._replace(
        gate=Gate(torch.ones(1, dtype=torch.int32), False)
    )
    mixer = passes.mixer_of(given, "cuda")
    (band,) = geometry.bands(given)
    scores = torch.ones(2, 8, 1, 4, 64, dtype=torch.float16)
    lse = torch.zeros(2, 4, 8)
    rows, slots = Rows(lse, lse, lse, lse, None, torch.ones(())), mixer.slots()
    slots.sums.zero_()
    mixer.mix_backward(scores, scores, band, rows, slots)
    assert bool(slots.sums.any()) == bool(change)


@pytest.mark.parametrize(
    ("given", "served"),
    [
        (lambda: given_problem(), True),
        (lambda: given_problem(causal=False), False),
        (lambda: given_problem(masked=True), False),
        (lambda: given_problem(dtype=torch.float32), False),
        (lambda: given_problem(rows=7), False),
        (lambda: given_problem(offset=-1), False),
        (lambda: given_problem(offset=60), False),
        (lambda: given_problem()._replace(halo=(1, 0)), False),
        (lambda: given_problem()._replace(terms=terms(units=40)), False),
    ],
)
def test_calls_that_cuda_does_not_serve_are_mixed_in_triton(emulated, given, served):
    mixer = passes.mixer_of(given(), "cuda")
    assert type(mixer) is (taps.CudaTapsMixer if served else TapsMixer)


@pytest.mark.parametrize(("capability", "served"), [((9, 0), True), ((8, 0), False)])
def test_gpus_with_less_shared_memory_mix_in_triton(monkeypatch, capability, served):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(windows, "_has_room", windows._has_room.__wrapped__)
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert windows.has_room() == (served and available)
    assert taps.shared_memory("taps_backward", windows.MOST_UNITS) <= 227 * 1024
