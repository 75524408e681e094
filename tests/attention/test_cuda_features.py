"""FIRE across heads in CUDA, on a CPU: against the formula, the textbook, and the kernels in Triton."""

import one_band
import pytest
import torch
from emulated_calls import MARKS, check, relative, solve
from test_fused_fire import FireProblem

from dape.attention.fused import geometry, passes, plan
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
    "odd sizes": problem_of(heads=5, kv_heads=1, hidden=7, rows=33, keys=75, query_offset=41, threshold=50.5),
    "padding": problem_of(batch=3, mask="left", threshold=30.5),
    "rows past L": problem_of(threshold=2.5),
    "scores alone": problem_of(inputs="scores"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_calls_equal_the_textbook(emulated, name):
    check(PROBLEMS[name])


def terms(heads=4, units=16, count=12, entries=100):
    """Return terms of some features; `x` grows from 0 to about 1 along the rows and keys."""
    shapes = (heads, 1 + count), (1 + count, units), (units, heads), (heads, units)
    tables = [torch.randn(shape) / 4 for shape in shapes]
    grid = torch.arange(entries)
    psi, scale = torch.log1p(0.3 * grid), 1 / torch.log1p(0.3 * grid.clamp(min=30))
    return Features(*tables, psi, scale, torch.randn(count), torch.randn(count) / 2)


def given_problem(rows=40, keys=80, offset=40, causal=True, masked=False, **how):
    """Return a problem of two elements."""
    kind = {"dtype": torch.float16} | {k: v for k, v in how.items() if k == "dtype"}
    made = terms(**{k: v for k, v in how.items() if k != "dtype"})
    return one_band.problem_of(made, made.static.shape[0], rows, keys, offset, causal, masked, **kind)


def check_mixer(**how):
    """Compare with the formula, by the errors of the mixer in Triton."""
    torch.manual_seed(0)
    given, errors = given_problem(**how), []
    for kind, backend in ((features.CudaFeaturesMixer, "cuda"), (FeaturesMixer, "triton")):
        torch.manual_seed(1)
        mixer = passes.mixer_of(given, backend)
        assert isinstance(mixer, kind)
        found, true = one_band.solutions(mixer)
        errors.append([relative(x, y.double()) for x, y in zip(found, true, strict=True)])
    print([f"{a:.1e}/{b:.1e}" for a, b in zip(*errors)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 1.1 * theirs < 1e-2


@pytest.mark.parametrize("masked", [False, True])
def test_the_mixer_is_what_its_terms_say_and_as_exact_as_in_triton(emulated, masked):
    check_mixer(masked=masked)
