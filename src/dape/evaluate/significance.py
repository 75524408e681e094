"""Paired tests of the difference between two encodings, over seeds and over documents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dape.errors import UserError

RESAMPLES = 9_999
FEWEST_DOCUMENTS = 20  # with fewer, p-values of the bootstrap are too small
Values = Sequence[float] | Float[np.ndarray, " values"]
_ROUNDING = 10 * np.finfo(np.float64).eps  # of a difference, relative to the subtracted numbers


@dataclass(frozen=True, slots=True)
class PairedTest:
    """A two-sided paired test of `candidate - baseline`; `difference` is the mean in nats a token.

    `p_value` is NaN where none exists, and `least` the smallest possible p-value.
    """

    name: str
    pairs: int
    difference: float
    p_value: float
    least: float = 0.0

    @property
    def few(self) -> bool:
        """Return whether the documents are too few for the p-value."""
        return "over documents" in self.name and self.pairs < FEWEST_DOCUMENTS


def paired_t(candidate: Sequence[float], baseline: Sequence[float]) -> PairedTest:
    """Return Student's paired t-test of two lists of losses, in the same order of seeds.

    The test takes losses, because a difference of losses is a ratio of perplexities. The p-value is
    NaN for losses that are not finite, and for differences without a spread, where t is 0 / 0 or
    infinite.

    Raises:
        UserError: below two seeds.
    """
    from scipy.stats import ttest_rel

    if len(candidate) < 2:
        raise UserError(f"paired t-test over {len(candidate)} seed: give at least 2")
    tested = np.isfinite([candidate, baseline]).all() and spreads(candidate, baseline)
    return PairedTest(
        name="paired t over seeds (scipy.stats.ttest_rel)",
        pairs=len(candidate),
        difference=float(np.mean(candidate) - np.mean(baseline)),
        p_value=float(ttest_rel(candidate, baseline).pvalue) if tested else math.nan,
    )


def spreads(values: Values, less: Values | float = 0.0) -> bool:
    """Return whether `values - less` differ by more than rounding; a t-test needs a spread."""
    largest = max(np.abs(values).max(), np.abs(less).max())
    return bool(np.ptp(np.subtract(values, less)) > _ROUNDING * largest)


def paired_bootstrap(
    candidate: Float[np.ndarray, " documents"],
    baseline: Float[np.ndarray, " documents"],
    tokens: Int[np.ndarray, " documents"],
) -> PairedTest:
    """Return the bootstrap over documents of the difference of two mean losses a token.

    Documents are drawn with replacement, with the losses under both models, and weighted by the
    number of scored tokens. With r of the R = 9,999 resamples on the far side of zero,
    `p = min(1, 2 (r + 1) / (R + 1))` (Davison and Hinkley 1997, section 4.2). The smallest p-value
    is 0.0002. Below about 20 documents, p-values are too small. Losses that are not finite have the
    p-value NaN.

    Raises:
        UserError: below two documents.
    """
    if len(tokens) < 2:
        raise UserError(f"bootstrap over {len(tokens)} document: give at least 2")
    difference = candidate - baseline
    finite = bool(np.isfinite(difference).all())
    return PairedTest(
        name=f"paired bootstrap over documents (scipy.stats.bootstrap, {RESAMPLES:,} resamples)",
        pairs=len(tokens),
        difference=float(_mean(difference, tokens)),
        p_value=_two_sided(difference, tokens) if finite else math.nan,
        least=2 / (RESAMPLES + 1),
    )


def _mean(losses: Any, weights: Any, axis: int = -1) -> Any:
    return np.average(losses, axis=axis, weights=weights)


def _two_sided(
    difference: Float[np.ndarray, " documents"], tokens: Int[np.ndarray, " documents"]
) -> float:
    """Return the p-value of `paired_bootstrap`."""
    from scipy.stats import bootstrap

    resampled = bootstrap(
        (difference, tokens),
        _mean,
        paired=True,
        n_resamples=RESAMPLES,
        batch=1_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).bootstrap_distribution
    beyond = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1)))
