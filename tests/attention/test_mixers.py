"""Each mixer on one band against the formula of its terms."""

import pytest
import torch
from one_band import problem_of, solutions
from torch.testing import assert_close

from dape.attention.fused import bands, naive, passes
from dape.attention.fused.geometry import Scratch
from dape.attention.fused.geometry import bands as bands_of
from dape.attention.fused.problem import Gate
from dape.attention.fused.rows import Rows
from dape.attention.fused.terms import Features, Mixed, Nothing, Static, Taps, terms_of

# The interpreter's own warnings, of NumPy.
pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
HEADS, UNITS, ENTRIES, FEATURES, TAPS = 3, 5, 24, 4, 3
SHAPES = {
    Mixed: ((HEADS, ENTRIES), (ENTRIES, UNITS), (UNITS, HEADS), (HEADS, UNITS)),
    Features: (
        *((HEADS, 1 + FEATURES), (1 + FEATURES, UNITS), (UNITS, HEADS), (HEADS, UNITS)),
        *((ENTRIES,), (ENTRIES,), (FEATURES,), (FEATURES,)),
    ),
    Taps: (
        *((HEADS, ENTRIES), (ENTRIES, TAPS * UNITS), (TAPS * UNITS, HEADS), (HEADS, TAPS * UNITS)),
        (UNITS,),
    ),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("causal", "masked"), [(True, False), (True, True), (False, True)])
def test_a_mixer_is_what_its_terms_say(kind, causal, masked):
    terms = kind(*(torch.randn(shape) for shape in SHAPES[kind]))
    problem = problem_of(terms, HEADS, 13, 19, 6, causal, masked)
    for found, true in zip(*solutions(passes.mixer_of(problem, "triton")), strict=True):
        assert_close(found, true, rtol=1e-4, atol=1e-4 * max(1, true.abs().max().item()))


def test_without_an_adapter_the_formula_adds_a_table_or_nothing():
    scores, seen = torch.randn(1, 2, 3, 4), torch.ones(1, 1, 3, 4, dtype=torch.bool)
    seen[..., 3] = False
    rows, keys, table = torch.arange(3), torch.arange(4), torch.randn(2, 5)
    added = torch.tensor(
        [[[table[h, abs(i - j)] for j in range(4)] for i in range(3)] for h in (0, 1)]
    )
    for terms, more in ((Nothing(), 0), (Static(table), added)):
        found = naive.logits(terms, scores, rows, keys, seen)
        assert (found[..., 3] == -torch.inf).all()
        assert_close(found[..., :3], (scores + more)[..., :3])


def test_the_number_of_tables_says_of_which_kind_they_are():
    for kind in (Nothing, Static, Mixed, Features, Taps):
        assert type(terms_of(torch.zeros(len(kind._fields), 1))) is kind


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("rows", "keys", "offset", "causal"),
    [
        (1, 1, 0, True),
        (130, 130, 0, True),
        (70, 200, 130, True),
        (200, 70, -90, True),
        (70, 130, 0, False),
    ],
)
def test_scores_of_a_band_are_all_that_rows_see(rows, keys, offset, causal, wide):
    terms = Mixed(*(torch.zeros(shape) for shape in SHAPES[Mixed]))
    problem = problem_of(terms, HEADS, rows, keys, offset, causal, False, torch.float16)
    tensors = (torch.randn_like(x) for x in problem[:3])
    problem = problem._replace(**dict(zip(("query", "key", "value"), tensors, strict=True)))
    if wide:
        problem = problem._replace(gate=Gate(torch.ones(1, dtype=torch.int32), True))
    (band,) = bands_of(problem)
    grad_out, delta = torch.randn_like(problem.query), torch.randn(2, HEADS, rows)
    given = Rows(delta, delta, grad_out, grad_out, None, torch.tensor(0.5))
    x, y = (Scratch.of(problem, (band,)).view(band) for _ in range(2))
    bands.scores(x, problem.part(band), y, given)
    query, key, value, grad_out = (t.double() for t in (*problem[:3], grad_out))
    seen = torch.ones(rows, keys).tril(offset).bool() if causal else torch.ones(rows, keys).bool()
    for scratch, true in (
        (x, query @ key.mT),
        (y, 2 * grad_out @ value.mT - delta[..., None].double()),
    ):
        found = scratch.permute(0, 3, 1, 2, 4).flatten(3)[..., :keys].double()
        assert_close(found[..., seen], true[..., seen], rtol=2e-3, atol=2e-2)
