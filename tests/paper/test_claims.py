"""Verdicts on losses chosen by hand, with the tests done again by scipy."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_rel

import evaluations
from dape.evaluate.compare import Group
from dape.evaluate.context import ContextUse, Tally
from dape.evaluate.significance import PairedTest
from dape.figures.tables import percent
from dape.paper.cells import Cell, Regime
from dape.paper.claims import (
    Better,
    Claim,
    Finding,
    Rise,
    Uses,
    Verdict,
    best_length,
    compare,
    far_losses,
    judge,
)
from dape.paper.results import as_record, verdicts_table
from dape.paper.study import Study
from dape.paper.sweep import TINY

REGIME = Regime("small", "arxiv", 128)
DOCUMENTS = np.linspace(0.9, 1.1, 20)  # by which evaluations.make spreads a loss


def group(label, *losses_by_seed):
    made = [evaluations.make(label, losses, seed) for seed, losses in enumerate(losses_by_seed)]
    return Group(label, tuple(made))


def study(*groups, regime=REGIME):
    return Study(regime, regime.corpus, (), groups, {})


def outcome(check, *groups):
    return check.find([study(*groups)]).outcome


FLAT = [3.0, 3.0, 3.0, 3.0, 3.0]


def flat(loss):
    return [loss] * 5


def test_better_over_seeds_is_the_paired_t_test():
    ours = [[2.9, *flat(2.9)[1:]], [2.8, *flat(2.8)[1:]], [2.95, *flat(2.95)[1:]]]
    theirs = [flat(3.0), flat(2.98), flat(3.01)]
    found = Better("dape-kerple", "kerple", REGIME).find(
        [study(group("dape-kerple", *ours), group("kerple", *theirs))]
    )
    expected = ttest_rel([2.9, 2.8, 2.95], [3.0, 2.98, 3.01])
    assert found.test.p_value == pytest.approx(expected.pvalue)
    assert found.test.difference == pytest.approx(-0.34 / 3)
    assert found.outcome == "not decidable at this scale" and expected.pvalue > 0.05
    assert found.seeds == 3
    assert "dape-kerple -10.7 % against kerple at 128" in found.number


@pytest.mark.parametrize(
    ("shifts", "expected"),
    [
        ((-0.10, -0.11, -0.09), "reproduced"),
        ((0.10, 0.11, 0.09), "not reproduced"),
        ((-0.10, 0.11, -0.09), "not decidable at this scale"),
    ],
)
def test_better_is_decided_by_sign_and_p(shifts, expected):
    base = (3.0, 2.9, 3.1)
    ours = group("dape-kerple", *[flat(b + s) for b, s in zip(base, shifts, strict=True)])
    theirs = group("kerple", *[flat(b) for b in base])
    assert outcome(Better("dape-kerple", "kerple", REGIME, times=16), ours, theirs) == expected


def test_seeds_are_paired_by_number_and_not_by_order():
    losses = {0: 3.0, 1: 2.5, 2: 2.0}
    ours = [evaluations.make("a", flat(losses[n] - 0.1 - n / 1000), n) for n in (2, 0, 1)]
    theirs = [evaluations.make("b", flat(losses[n]), n) for n in (0, 1, 2)]
    test = compare(Group("a", tuple(ours)), 128, Group("b", tuple(theirs)), 128)
    assert test.p_value == pytest.approx(ttest_rel([2.9, 2.399, 1.898], [3.0, 2.5, 2.0]).pvalue)


def test_with_one_seed_the_test_is_over_documents():
    found = Better("dape-kerple", "kerple", REGIME).find(
        [study(group("dape-kerple", flat(2.9)), group("kerple", flat(3.0)))]
    )
    assert found.outcome == "reproduced" and found.seeds == 1
    assert found.test.pairs == 20 and "documents" in found.test.name
    assert found.test.p_value == pytest.approx(2 / 10_000), "every resample is below zero"


@pytest.mark.parametrize(
    ("p", "expected"), [(0.049, "reproduced"), (0.051, "not decidable at this scale")]
)
def test_a_p_value_below_five_percent_decides(p, expected):
    """Three differences of mean -0.1 with the deviation that gives t the two-sided p."""
    spread = 0.1 * math.sqrt(3) / student.isf(p / 2, df=2)
    base, shifts = (3.0, 2.9, 3.1), (-0.1, -0.1 - spread, -0.1 + spread)
    ours = group("a", *[flat(b + shift) for b, shift in zip(base, shifts, strict=True)])
    found = Better("a", "b", REGIME).find([study(ours, group("b", *map(flat, base)))])
    assert found.test.p_value == pytest.approx(p) and found.outcome == expected


@pytest.mark.parametrize("losses", [(math.nan, 3.0, 3.0), (math.nan,)])
def test_a_loss_that_is_no_number_decides_nothing(losses):
    ours, theirs = group("a", *map(flat, losses)), group("b", *(flat(3.0) for _ in losses))
    found = Better("a", "b", REGIME).find([study(ours, theirs)])
    assert math.isnan(found.test.p_value) and found.outcome == "not decidable at this scale"


def test_a_document_counts_by_its_tokens():
    """By hand: a document of 300 tokens loses 0.1, and 19 documents of 100 gain 0.1 a token."""
    gains = [-0.1] + [0.1] * 19
    made = [evaluations.make(name, flat(3.0)) for name in ("a", "b")]
    for each, sign in zip(made, (-1, 0), strict=True):
        each.targets.tokens[:] = [300] + [100] * 19
        for measured in each.measurements:
            measured.document_losses[:] = [3.0 + sign * gain for gain in gains]
    test = compare(*(x for each in made for x in (Group(each.subject.scheme, (each,)), 128)))
    assert test.difference == pytest.approx((0.1 * 300 - 0.1 * 1900) / 2200)


def test_a_length_that_a_run_refused_is_not_measured():
    theirs = group("b", flat(3.0), flat(3.0))
    ours = group("a", flat(2.9), [2.9, 2.9, 2.9, 2.9, None])
    assert Better("a", "b", REGIME, times=16).find([study(ours, theirs)]) is None
    assert Rise("a", REGIME, 16, rises=True).find([study(ours)]) is None
    assert outcome(Better("a", "b", REGIME, times=8), ours, theirs) == "reproduced"


def test_the_best_length_is_that_of_the_mean_over_seeds():
    """A seed has the lowest loss of all at 128, and the mean is lowest at 512."""
    curve = group("k", [2.0, 3.0, 2.9, 3.1, 3.2], [4.0, 3.0, 2.7, 3.1, 3.2])
    assert best_length(curve, 2048) == 512
    found = Rise("k", REGIME, 16, rises=True).find([study(curve)])
    assert found.seeds == 2 and found.test.difference == pytest.approx(3.2 - 2.8)


@pytest.mark.parametrize(
    ("change", "steady", "rising"),
    [
        (0.03, "not reproduced", "reproduced"),
        (0.012, "not reproduced", "reproduced"),
        (0.008, "reproduced", "not reproduced"),
        (0.002, "reproduced", "not reproduced"),
        (-0.5, "reproduced", "not reproduced"),
    ],
)
def test_a_rise_is_over_the_best_shorter_length_and_beyond_one_percent(change, steady, rising):
    losses = [3.4, 3.0, 3.2, 3.2, 3.0 + change]
    jitter = [
        evaluations.make("kerple", [x + n * 1e-4 * (x == losses[4]) for x in losses], n)
        for n in range(3)
    ]
    for curve in (group("kerple", losses), Group("kerple", tuple(jitter))):
        assert best_length(curve, 2048) == 256
        assert outcome(Rise("kerple", REGIME, 16, rises=False), curve) == steady
        assert outcome(Rise("kerple", REGIME, 16, rises=True), curve) == rising


def test_a_rise_up_to_a_length_ignores_what_comes_after():
    losses = [3.0, 2.9, 2.8, 3.5, 2.0]
    found = Rise("kerple", REGIME, 8, rises=True).find([study(group("kerple", losses))])
    assert found.outcome == "reproduced"
    assert "+101.4 % at 1,024 over its best, at 512" in found.number
    assert percent(0.7) == "+101.4 %"


def test_one_percent_is_the_margin_and_p_is_that_of_the_margin():
    losses = [3.0, 3.0 + math.log(1.01) + 0.01, *FLAT[2:]]
    test = compare(group("k", losses), 256, group("k", losses), 128, math.log(1.01))
    assert test.difference == pytest.approx(math.log(1.01) + 0.01)
    below = DOCUMENTS * (losses[1] - losses[0]) - math.log(1.01)
    assert (below > 0).all() and test.p_value == pytest.approx(2 / 10_000)


def test_a_claim_is_what_its_checks_are():
    groups = [
        *(group("kerple", flat(3.0)), group("dape-kerple", flat(2.9))),
        *(group("alibi", flat(3.0)), group("dape-alibi", flat(3.1))),
        *(group("fire", flat(3.0)), group("dape-fire", flat(3.0))),
    ]
    good, bad, even = (Better(f"dape-{x}", x, REGIME) for x in ("kerple", "alibi", "fire"))
    absent = Better("dape-t5", "t5", REGIME)
    elsewhere = Better("dape-kerple", "kerple", Regime("350m", "arxiv", 128))
    too_long = Better("dape-kerple", "kerple", REGIME, times=64)
    for checks, expected, number in [
        ((good,), "reproduced", 1),
        ((good, absent, elsewhere, too_long), "reproduced", 1),
        ((good, even), "not decidable at this scale", 2),
        ((good, even, bad), "not reproduced", 3),
        ((absent,), "not measured", 0),
    ]:
        verdict = judge(Claim("it is", "section 0", checks), [study(*groups)])
        assert verdict.outcome == expected
        assert len(verdict.findings) == number


def test_equal_losses_decide_nothing():
    same = [group(name, flat(3.0), flat(3.1), flat(2.9)) for name in ("a", "b")]
    assert outcome(Better("a", "b", REGIME), *same) == "not decidable at this scale"


def test_far_tokens_are_those_that_only_a_longer_window_holds(tmp_path):
    """By hand: two documents, windows of 128, 256 and 512, and four bins."""
    tokens = [[9, 9], [2, 1], [1, 0], [7, 7]]
    near, middle, far, nowhere = [30.0, 30.0], [6.0, 3.0], [4.0, 0.0], [50.0, 50.0]
    losses = [
        [near, middle, far, nowhere],
        [near, [3.0, 2.5], far, nowhere],
        [near, [3.0, 2.0], [1.0, 0.0], nowhere],
    ]
    other = [[[2 * loss for loss in each] for each in row] for row in losses]
    unlike = Tally(tokens[::-1], losses)
    records = [use(tokens, values, token=unlike) for values in (losses, other)]
    found = far_losses(records)
    assert [each.tolist() for each in found] == [[3.0, 1.0], [15.0, 4.5], [6.0, 3.0]]


@pytest.mark.parametrize(("gain", "expected"), [(0.5, "reproduced"), (-0.2, "not reproduced")])
def test_far_text_is_used_if_far_tokens_gain(gain, expected, tmp_path):
    cell = Cell(tmp_path, "small/kerple-0", "kerple", ())
    tokens = [[5] * 25, [4] * 24 + [0], [5] * 25]
    short = [[10.0] * 25, [12.0] * 24 + [0.0], [20.0] * 25]
    long = [[10.0] * 25, [12.0 - gain * 4] * 24 + [0.0], [20.0] * 25]
    file = cell.record.evaluation("context")
    use(tokens, [short, long], lengths=[128, 256]).save(file)
    where = replace(study(), cells=(cell,))
    found = Uses("kerple", REGIME).find([where])
    assert found.outcome == expected
    assert found.test.difference == pytest.approx(-gain)
    assert found.test.pairs == 24, "a document without far tokens says nothing"
    assert "by windows of 256 over 128 on 96 far tokens" in found.number
    assert Uses("alibi", REGIME).find([where]) is None


def test_a_document_counts_by_its_far_tokens(tmp_path):
    """By hand: 12 tokens of a document lose 0.5 each, and 1 or 4 of 19 documents gain 0.25."""
    cell = Cell(tmp_path, "small/kerple-0", "kerple", ())
    far, rest = [12, 1] + [4] * 18, [5] * 20
    before = [[10.0] * 20, [3.0 * n for n in far], [20.0] * 20]
    after = [before[0], [3.5 * 12] + [2.75 * n for n in far[1:]], before[2]]
    record = use([rest, far, rest], [before, after], lengths=[128, 256])
    record.save(cell.record.evaluation("context"))
    found = Uses("kerple", REGIME).find([replace(study(), cells=(cell,))])
    assert found.test.difference == pytest.approx((0.5 * 12 - 0.25 * 73) / 85)


def use(tokens, losses, lengths=(128, 256, 512), token=None):
    made = evaluations.make("kerple", [3.0] * 5, documents=len(tokens[0]))
    tally = Tally(tokens, losses)
    return ContextUse(
        subject=made.subject,
        targets=made.targets,
        lengths=list(lengths),
        positions=[],
        tallies={"token": token or tally, "pair": tally},
        provenance=made.provenance,
    )


def test_few_documents_decide_nothing(tmp_path):
    cell = Cell(tmp_path, "small/kerple-0", "kerple", ())
    tokens = [[5] * 19, [4] * 19, [5] * 19]
    losses = [[[10.0] * 19, [mean * 4.0] * 19, [20.0] * 19] for mean in (3.0, 2.0)]
    file = cell.record.evaluation("context")
    use(tokens, losses, lengths=[128, 256]).save(file)
    check = Uses("kerple", REGIME)
    found = check.find([replace(study(), cells=(cell,))])
    assert found.test.p_value < 0.001 and found.outcome == "not decidable at this scale"
    verdict = judge(Claim("far text", "here", (check,)), [replace(study(), cells=(cell,))])
    shown = verdicts_table([verdict])
    assert shown.rows[-1][-1] == "—" and "fewer than 20 documents" in shown.note
    assert as_record(verdict)["checks"][0]["p"] is None, "too small, and so none"


def test_one_document_decides_nothing_and_ends_no_report(tmp_path):
    made = [evaluations.make(x, flat(loss), documents=1) for x, loss in (("a", 2.9), ("b", 3.0))]
    groups = [Group(each.subject.scheme, (each,)) for each in made]
    found = Better("a", "b", REGIME).find([study(*groups)])
    assert found.test.difference == pytest.approx(
        -0.1 * made[0].measurements[0].document_losses[0] / 2.9
    )
    assert found.outcome == "not decidable at this scale" and found.test.pairs == 1
    cell = Cell(tmp_path, "small/kerple-0", "kerple", ())
    for far, pairs in (([4, 1] + [0] * 23, 2), ([4] + [0] * 24, 1), ([0] * 25, 0)):
        losses = [[[10.0] * 25, [mean * n for n in far], [20.0] * 25] for mean in (3.0, 2.0)]
        record = use([[5] * 25, far, [5] * 25], losses, lengths=[128, 256])
        record.save(cell.record.evaluation("context"))
        found = Uses("kerple", REGIME).find([replace(study(), cells=(cell,))])
        assert found.outcome == "not decidable at this scale" and found.test.pairs == pairs
        assert ("bootstrap" in found.test.name) == (pairs == 2)
        assert ("-63.2 %" if pairs else "+nan %") in found.number


def test_a_verdict_says_where_a_part_of_its_checks_is_measured():
    finding = Finding("reproduced", "", 1, PairedTest("t", 3, -0.1, 0.01))
    claim = Claim("a claim", "section 0", (Better("a", "b", TINY), Better("c", "d", TINY)))
    for findings, part in (((), ""), ((finding,), "1 of 2 checks measured"), ((finding,) * 2, "")):
        assert Verdict(claim, "reproduced", findings).part == part


def test_among_equal_p_values_the_smallest_difference_has_the_least_support():
    """All p are the smallest of the bootstrap, 0.0002. The margin of a rise is 1 %."""
    arms = {"alibi": 3.0, "dape-alibi": 2.93, "kerple": 3.1, "dape-kerple": 3.06, "fire": 3.0}
    where = [study(*(group(arm, flat(loss)) for arm, loss in arms.items()))]
    better = tuple(Better(f"dape-{x}", x, REGIME) for x in ("alibi", "kerple"))
    for checks in (better, better[::-1]):
        verdict = judge(Claim("DAPE-X is better", "", checks), where)
        assert {each.test.p_value for each in verdict.findings} == {0.0002}
        assert verdict.weakest.number.startswith("dape-kerple -3.9 %")
    steady, falling = flat(3.0), [3.0, 3.0, 3.0, 3.0, 2.998]
    where = [study(group("a", falling), group("b", [*steady[:4], 3.004]))]
    checks = tuple(Rise(arm, REGIME, 16, rises=False) for arm in "ab")
    assert judge(Claim("steady", "", checks), where).weakest.number.startswith("b +0.4 %")


def test_the_greatest_p_value_has_the_least_support():
    sure, unsure, failed, nan = (
        Finding("reproduced", "", 3, p and PairedTest("t", 3, -0.1, p))
        for p in (0.001, 0.04, None, math.nan)
    )
    small = replace(sure, test=replace(sure.test, difference=-0.01))
    undecided = replace(nan, outcome="not decidable at this scale")
    claim = Claim("a claim", "section 0", ())
    for findings, weakest in [
        ((sure, unsure), unsure),
        ((unsure, sure), unsure),
        ((unsure, failed, sure), failed),
        ((unsure, nan), nan),
        ((unsure, small), unsure),
        ((unsure, undecided), unsure),
        ((), None),
    ]:
        assert Verdict(claim, "reproduced", findings).weakest is weakest


def test_arms_are_compared_on_the_seeds_that_both_have():
    """Seed 1 of the baseline is much worse, and the candidate lacks the seed."""
    ours = Group("dape-kerple", (evaluations.make("dape-kerple", flat(2.9), 0),))
    theirs = group("kerple", flat(3.0), flat(4.0))
    found = Better("dape-kerple", "kerple", REGIME).find([study(ours, theirs)])
    assert found.test.difference == pytest.approx(-0.1) and found.seeds == 1
    assert "documents" in found.test.name and found.test.pairs == 20


def test_arms_without_a_shared_seed_decide_nothing():
    """The luck of the seeds is in the difference, and no test over documents sees the luck."""
    ours = tuple(evaluations.make("dape-kerple", flat(2.9), seed) for seed in (0, 1))
    theirs = tuple(evaluations.make("kerple", flat(3.0), seed) for seed in (2, 3))
    for most in (1, 2):  # with four seeds on both sides together
        groups = Group("dape-kerple", ours[:most]), Group("kerple", theirs[:most])
        found = Better("dape-kerple", "kerple", REGIME).find([study(*groups)])
        assert found.test.difference == pytest.approx(-0.1)
        assert found.test.p_value < 0.05 and found.seeds == 0
        assert "documents" in found.test.name and found.outcome == "not decidable at this scale"


def test_an_arm_whose_runs_all_failed_leaves_its_claim_open(tmp_path):
    arms = [("kerple", 0), ("dape-kerple", 0), ("dape-fire", 0), ("dape-fire", 1)]
    cells = tuple(Cell(tmp_path, f"small/{arm}-{n}", arm, ()) for arm, n in arms)
    errors = dict.fromkeys(("small/dape-kerple-0", "small/dape-fire-1"), "step 7: loss nan")
    where = replace(study(group("kerple", flat(3.0))), cells=cells, errors=errors)
    good = replace(where, groups=(*where.groups, group("alibi", flat(2.9))))
    fails = Better("dape-kerple", "kerple", REGIME), Rise("dape-kerple", REGIME, 16, False)
    turned = Better("kerple", "dape-kerple", REGIME)
    for check in (*fails, turned, Uses("dape-kerple", REGIME)):
        found = check.find([where])
        assert found.outcome == "not decidable at this scale" and found.test is None
        assert found.number == "dape-kerple failed: step 7: loss nan (small-arxiv-128-150M)"
    verdict = judge(Claim("it is", "", (Better("alibi", "kerple", REGIME), fails[0])), [good])
    assert verdict.outcome == "not decidable at this scale" and verdict.weakest.test is None
    assert as_record(verdict)["checks"][1]["p"] is None
    row = verdicts_table([verdict]).rows[-1]
    assert row[1:] == ["not decidable at this scale", "1", "—"]
    assert Better("dape-fire", "kerple", REGIME).find([where]) is None, "is only not measured yet"


def test_a_check_counts_the_failed_runs_beside_finished_ones(tmp_path):
    arms = [("kerple", 0), ("kerple", 1), ("dape-kerple", 0), ("dape-kerple", 1), ("fire", 0)]
    cells = tuple(Cell(tmp_path, f"small/{arm}-{n}", arm, ()) for arm, n in arms)
    errors = {"small/dape-kerple-1": "step 7: loss nan", "small/fire-0": "out of memory"}
    groups = group("kerple", flat(3.0), flat(3.1)), group("dape-kerple", flat(2.9))
    where = replace(study(*groups), cells=cells, errors=errors)
    found = Better("dape-kerple", "kerple", REGIME).find([where])
    assert found.number.endswith("(small-arxiv-128-150M, runs failed: 1)") and found.seeds == 1
    turned = Better("kerple", "dape-kerple", REGIME).find([where])
    assert turned.number.endswith("(small-arxiv-128-150M, runs failed: 1)")
    assert Rise("kerple", REGIME, 16, True).find([where]).number.endswith("(small-arxiv-128-150M)")
    for cell, after in zip(cells[2:4], (2.0, 9.0), strict=True):  # the second is of a failed run
        losses = [[[10.0] * 25, [mean * 4] * 25, [20.0] * 25] for mean in (3.0, after)]
        record = use([[5] * 25, [4] * 25, [5] * 25], losses, lengths=[128, 256])
        record.save(cell.record.evaluation("context"))
    far = Uses("dape-kerple", REGIME).find([where])
    assert far.test.difference == pytest.approx(-1.0) and far.seeds == 1
    assert far.number.endswith("on 100 far tokens (small-arxiv-128-150M, runs failed: 1)")


def test_losses_that_are_no_numbers_are_not_the_best_and_huge_ones_are_infinitely_worse():
    assert best_length(group("kerple", [math.nan, 3.2, 3.0, 3.1, 3.1]), 2048) == 512
    found = Better("a", "b", REGIME).find([study(group("a", flat(900.0)), group("b", flat(3.0)))])
    assert "a +inf % against b" in found.number and found.outcome == "not reproduced"


def test_checks_on_two_corpora_of_a_regime_name_the_corpus():
    mixed = Regime("small", "mixed", 128)
    studies = [
        Study(mixed, corpus, (), (group("kerple", [3.0, 3.0, 3.0, 3.0, last]),), {})
        for corpus, last in (("arxiv", 3.5), ("books", 3.0))
    ]
    checks = tuple(Rise("kerple", mixed, 16, True, corpus) for corpus in ("arxiv", "books"))
    numbers = [each.number for each in judge(Claim("", "", checks), studies).findings]
    assert ["on-arxiv" in numbers[0], "on-books" in numbers[1]] == [True, True]
