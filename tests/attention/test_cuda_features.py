"""FIRE across heads in CUDA, on a CPU: against formula, textbook, and the kernels in Triton."""

import one_band
import pytest
import torch
from emulated_calls import MARKS, check, check_repeats, relative, solve_seeded
from test_fused_fire import FireProblem

from dape.attention.fused import geometry, overflow, passes, plan
from dape.attention.fused.cuda import features, mix
from dape.attention.fused.mixers.features import FeaturesMixer
from dape.attention.fused.problem import Gate
from dape.attention.fused.rows import Rows
from dape.attention.fused.terms import Features

pytestmark = MARKS


def problem_of(hidden=16, inputs="concat", **given):
    sizes = {"batch": 1, "rows": 40, "keys": 40, "head_dim": 16, "value_dim": 16}
    return FireProblem(**sizes | given, adapter=(hidden, 1, True, inputs))


PROBLEMS = {
    "two elements": problem_of(batch=2, rows=37, keys=37),
    "12 heads, 32 units, 32 features": problem_of(heads=12, kv_heads=12, hidden=32, units=32),
    "odd sizes": problem_of(
        heads=5, kv_heads=1, hidden=7, rows=33, keys=75, query_offset=41, threshold=50.5
    ),
    "padding": problem_of(batch=3, mask="left", threshold=30.5),
    "rows past L": problem_of(threshold=2.5),
    "scores alone": problem_of(inputs="scores"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_calls_equal_the_textbook(emulated, name):
    check(PROBLEMS[name])


def terms(heads=4, units=16, count=12, entries=100, ends=None):
    """Return terms whose ratios grow from 0 to about 1, with features that end at some ratios."""
    shapes = (heads, 1 + count), (1 + count, units), (units, heads), (heads, units)
    tables = [torch.randn(shape) / 4 for shape in shapes]
    index = torch.arange(entries)
    psi, scale = torch.log1p(0.3 * index), 1 / torch.log1p(0.3 * index.clamp(min=30))
    weight = torch.randn(count)
    bias = torch.randn(count) / 2 if ends is None else -weight * ends
    return Features(*tables, psi, scale, weight, bias)


def given_problem(made=None, rows=40, keys=80, offset=40, causal=True, masked=False, wide=False):
    """Return a problem of two elements."""
    made = terms() if made is None else made
    dtype = torch.float32 if wide else torch.float16
    heads = len(made.static)
    return one_band.problem_of(made, heads, rows, keys, offset, causal, masked, dtype)


def check_mixer(given):
    """Compare with the formula, by the errors of the mixer in Triton."""
    errors = []
    for kind, backend in ((features.CudaFeaturesMixer, "cuda"), (FeaturesMixer, "triton")):
        torch.manual_seed(1)
        mixer = passes.mixer_of(given, backend)
        assert isinstance(mixer, kind)
        found, true = one_band.solutions(mixer)
        errors.append([relative(x, y.double()) for x, y in zip(found, true, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 1.1 * theirs < 1e-2


@pytest.mark.parametrize("masked", [False, True])
def test_the_mixer_is_what_its_terms_say_and_as_exact_as_in_triton(emulated, masked):
    check_mixer(given_problem(masked=masked))


def test_more_pieces_than_a_warp_sums_at_a_time(emulated):
    """32 keys at small distances lie in more than 8 pieces of 33."""
    given = given_problem(terms(count=32, ends=torch.rand(32)), rows=36, keys=36, offset=0)
    check_mixer(given)


def test_features_that_end_at_0_or_never(emulated):
    made = terms(count=8)
    made.weight.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0, -1.0, 2.0, -2.0, 30.0]))
    made.bias.copy_(torch.tensor([0.7, -0.7, 0.0, 0.0, 0.0, 1.0, -1.0, -10.0]))
    given = given_problem(made._replace(hidden=made.hidden / 9, static=made.static / 9))
    for found, true in zip(*one_band.solutions(passes.mixer_of(given, "cuda")), strict=True):
        assert relative(found, true.double()) < 1e-3


@pytest.mark.parametrize(
    ("rows", "module", "name", "value", "elements", "segments", "add"),
    [
        (40, mix, "BLOCKS", 16, 2, 1, False),
        (75, mix, "ROWS", 32, 1, 2, False),
        (134, geometry, "SCORES_PER_BAND", 4 * 64 * 64, 1, 1, True),
    ],
)
def test_elements_segments_and_bands_change_nothing(
    emulated, monkeypatch, rows, module, name, value, elements, segments, add
):
    shape = problem_of(batch=2, heads=4, rows=rows, keys=rows + 5, query_offset=5)
    expected = solve_seeded(shape)
    monkeypatch.setattr(module, name, value)
    given = given_problem(terms(entries=200), rows, rows + 5, 5)
    slots = passes.mixer_of(given, "cuda").slots()
    assert slots[2:] == (elements, segments, add)
    for found, true in zip(solve_seeded(shape), expected, strict=True):
        assert relative(found, true.double()) < 1e-3


def test_two_backward_passes_agree_bit_for_bit(emulated):
    check_repeats(PROBLEMS["two elements"])


def test_large_scores_go_over_to_the_wide_range(emulated, monkeypatch):
    monkeypatch.setattr(overflow, "LARGEST_SCORE", -1.0)
    check(PROBLEMS["two elements"])


def test_a_plan_notes_all_that_several_bands_start(emulated, monkeypatch):
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 4 * 64 * 64)
    noted, unit = plan._Recorder(), torch.ones(())
    monkeypatch.setattr(plan._current, "recorder", noted)
    given = given_problem(terms(entries=200), 134, 139, 5)
    with noted:
        mixer = passes.mixer_of(given, "cuda")
        slots = mixer.slots()
        mixer.gradients(slots, unit, given.terms)
    assert slots.add and len(noted.noted) > 5


@pytest.mark.parametrize(
    "change",
    [
        {"    wait<STAGES - 1>();\n": ""},
        {"piece += pieces.edge[p] < ratio;": "piece += pieces.edge[p] < 0.9f * ratio;"},
        {"sum + (fmaf(v, m, c) * once": "sum + (c * once"},
        {"slots.leave(acc, track);": ""},
    ],
)
def test_a_wrong_kernel_is_noticed(emulated):
    given = given_problem(terms(count=32, ends=torch.rand(32)), rows=36, keys=36, offset=0)
    with pytest.raises(AssertionError):
        check_mixer(given)


@pytest.mark.parametrize("change", [{"if (gated": "if (false && gated"}, {}])
def test_a_backward_pass_that_is_not_wanted_does_nothing(emulated, change):
    gate = Gate(torch.ones(1, dtype=torch.int32), False)
    given = given_problem(rows=8, keys=8, offset=0)._replace(gate=gate)
    mixer = passes.mixer_of(given, "cuda")
    (band,) = geometry.bands(given)
    scores = torch.ones(2, 8, 1, 4, 64, dtype=torch.float16)
    lse = torch.zeros(2, 4, 8)
    rows, slots = Rows(lse, lse, lse, lse, None, torch.ones(())), mixer.slots()
    into = Features(*(torch.full_like(x, 7.0) for x in given.terms))
    slots.sums.zero_()
    mixer.mix_backward(scores, scores, band, rows, slots)
    assert bool(slots.sums.any()) == bool(change)
    mixer.gradients(slots, rows.unit, into)
    assert (into.weight == 7).all() != bool(change)


@pytest.mark.parametrize(
    ("given", "served"),
    [
        (lambda: given_problem(), True),
        (lambda: given_problem(masked=True), True),
        (lambda: given_problem(causal=False), False),
        (lambda: given_problem(wide=True), False),
        (lambda: given_problem(offset=-1), False),
        (lambda: given_problem(offset=41), False),
        (lambda: given_problem(terms(heads=17)), False),
        (lambda: given_problem(terms(units=33)), False),
        (lambda: given_problem(terms(count=33)), False),
    ],
)
def test_calls_that_cuda_does_not_serve_are_mixed_in_triton(emulated, given, served):
    mixer = passes.mixer_of(given(), "cuda")
    assert type(mixer) is (features.CudaFeaturesMixer if served else FeaturesMixer)
    assert features.shared_memory("features_backward", 32, 32) <= 113 * 1024
