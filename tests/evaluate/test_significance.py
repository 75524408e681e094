"""Paired tests against scipy's own answers on raw numbers, textbook values and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from dape.errors import UserError
from dape.evaluate.significance import RESAMPLES, paired_bootstrap, paired_t


def test_paired_t_equals_scipy_and_the_formula():
    candidate, baseline = [1.31, 1.28, 1.35], [1.40, 1.38, 1.41]
    test = paired_t(candidate, baseline)
    difference = np.subtract(candidate, baseline)
    t = difference.mean() / (difference.std(ddof=1) / math.sqrt(3))
    assert test.p_value == pytest.approx(2 * stats.t.sf(abs(t), df=2), rel=1e-9)
    assert test.p_value == pytest.approx(stats.ttest_rel(candidate, baseline).pvalue, rel=1e-12)
    assert test.difference == pytest.approx(difference.mean())
    assert (test.pairs, test.least) == (3, 0)
    assert "ttest_rel" in test.name


def test_paired_t_uses_the_pairing():
    seeds = np.array([0.0, 5.0, 10.0])
    shifted = seeds + np.array([1.0, 1.01, 0.99])
    assert paired_t(shifted.tolist(), seeds.tolist()).p_value < 1e-3
    assert stats.ttest_ind(shifted, seeds).pvalue > 0.5


def test_bootstrap_equals_the_t_test_on_many_normal_pairs_of_equal_weight():
    generator = np.random.default_rng(3)
    baseline = generator.normal(3.0, 1.0, 200)
    candidate = baseline + generator.normal(0.02, 0.15, 200)
    test = paired_bootstrap(candidate, baseline, np.full(200, 256))
    expected = stats.ttest_rel(candidate, baseline).pvalue
    assert 0.01 < expected < 0.9
    assert test.p_value == pytest.approx(expected, abs=0.02)
    assert test.pairs == 200


def test_bootstrap_weighs_documents_by_their_tokens():
    test = paired_bootstrap(np.array([1.0, 2.0]), np.array([0.0, 0.0]), np.array([300, 100]))
    assert test.difference == pytest.approx(1.25)


@pytest.mark.parametrize("seed", range(3))
def test_bootstrap_draws_a_document_with_its_tokens(seed):
    """By a loop of our own. Long documents lose least, so that other pairs have another p."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(10, 1000, 25)
    difference = -0.2 * tokens / 1000 + generator.normal(0.14, 0.1, 25)
    drawn = generator.integers(0, 25, (20_000, 25))
    means = [np.average(difference[row], weights=tokens[row]) for row in drawn]
    expected = 2 * min(np.mean(np.less_equal(means, 0)), np.mean(np.greater_equal(means, 0)))
    baseline = generator.normal(3.0, 1.0, 25)
    test = paired_bootstrap(baseline + difference, baseline, tokens)
    assert 0.01 < expected < 0.99
    assert test.p_value == pytest.approx(expected, abs=0.02)
    assert test == paired_bootstrap(baseline + difference, baseline, tokens), "equal draws"
    assert test.least == pytest.approx(0.0002)


def test_bootstrap_cannot_claim_less_than_its_resamples_show():
    test = paired_bootstrap(np.full(5, 2.0), np.full(5, 1.0), np.full(5, 10))
    assert test.p_value == pytest.approx(2 / (RESAMPLES + 1))


def test_no_difference_is_no_evidence():
    losses = np.linspace(1, 2, 20)
    assert paired_bootstrap(losses, losses, np.full(20, 10)).p_value == 1.0


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_a_t_test_without_a_spread_has_no_p():
    """The variance is zero, and t infinite or 0 / 0, also where rounding is all that differs."""
    for candidate, baseline in (
        ([2.5, 2.25, 2.0], [2.0, 1.75, 1.5]),
        ([2.5, 2.25], [2.0, 1.75]),
        ([1.5, 1.6], [1.5, 1.6]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([3.1 + 0.01, 2.7 + 0.01, 2.9 + 0.01], [3.1, 2.7, 2.9]),
    ):
        assert math.isnan(paired_t(candidate, baseline).p_value)
    assert stats.ttest_rel(candidate, baseline).pvalue < 1e-20, "by the rounding of the last pair"
    close = [3.1 + 0.01, 2.7 + 0.01, 2.9 + 0.01 + 1e-12]
    expected = stats.ttest_rel(close, baseline).pvalue
    assert paired_t(close, baseline).p_value == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_evidence(value):
    losses = np.linspace(1, 2, 20)
    broken = np.where(np.arange(20) == 3, value, losses)
    for pair in ((broken, losses + 0.1), (losses, broken), (broken, broken)):
        assert math.isnan(paired_bootstrap(*pair, np.full(20, 10)).p_value)
    assert math.isnan(paired_t([1.0, value], [1.0, 2.0]).p_value)
    assert math.isnan(paired_t([1.0, value], [1.0, value]).p_value)


def test_a_single_pair_is_refused():
    with pytest.raises(UserError, match="give at least 2"):
        paired_t([1.0], [2.0])
    with pytest.raises(UserError, match="give at least 2"):
        paired_bootstrap(np.ones(1), np.ones(1), np.ones(1, dtype=int))
