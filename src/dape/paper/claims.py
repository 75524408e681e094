"""The paper's claims, decided from the records by rules.

A check compares two mean losses on the same tokens, and gives the difference d in nats a token and
a two-sided p of d = m. With three seeds or more the test is the paired t-test over seeds. With
fewer seeds the test is the paired bootstrap over documents, valid for the compared models alone.

| check | d | m | reproduced, with p < 0.05 |
|---|---|---|---|
| `Better` | candidate less baseline | 0 | d < m |
| `Rise`, steady | a length less the best shorter length | log 1.01 | d < m |
| `Rise`, rising | a length less the best shorter length | log 1.01 | d > m |
| `Uses` | the longest window less the training length, on far tokens | 0 | d < m |

The best shorter length is the best on the same documents. The luck of the choice makes the
difference of `Rise` too large and p of `rising` too small, by at most the factor of the number of
shorter lengths. For `steady` the choice is on the safe side.

A token is far if the pair of its predecessor and the token occurred last beyond the training length
and within the longest window. `Uses` always tests over documents.

With p < 0.05 and d on the wrong side of m the check is not reproduced. With a greater p, or over
fewer than 20 documents, the check is not decidable at the measured scale. A perplexity up to 1 %
above the best perplexity counts as steady. A claim is not reproduced if any check is not
reproduced, reproduced if all checks are reproduced, and otherwise not decidable. A check is not
decidable if all runs of an arm diverged or ran out of memory. Checks without records are left out.
Without any check the claim is not measured. Arms are compared on their shared seeds, and
without a shared seed the check is not decidable.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from dape.chomsky.grid import Grid
from dape.evaluate import context
from dape.evaluate.compare import Group, paired
from dape.evaluate.context import ContextUse
from dape.evaluate.significance import PairedTest, paired_bootstrap, paired_t
from dape.figures.tables import percent
from dape.paper.cells import Regime
from dape.paper.study import Study
from dape.paper.sweep import CONTEXT

Evidence = Sequence[Study | Grid]  # the outcome of measurements
Documents = Float[np.ndarray, " documents"]
Tokens = Int[np.ndarray, " documents"]
Outcome = Literal["reproduced", "not reproduced", "not decidable at this scale", "not measured"]
_FROM_THE_WORST: tuple[Outcome, ...] = (
    "not reproduced",
    "not decidable at this scale",
    "reproduced",
)
SIGNIFICANT = 0.05
SEEDS = 3  # least number of seeds for a test over seeds
MARGIN = math.log(1.01)


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of a check: the number, the shared seeds, and the test; None if an arm failed.

    The test is of difference = `margin`.
    """

    outcome: Outcome
    number: str
    seeds: int
    test: PairedTest | None
    margin: float = 0.0


class Check(ABC):
    """A rule to decide a claim, or a part of a claim."""

    @abstractmethod
    def find(self, evidence: Evidence) -> Finding | None:
        """Return the finding from the records, or None without records."""

    def moved(self, move: Callable[[Regime], Regime]) -> "Check":
        """Return the check in another regime; a check without a regime stays."""
        return self


@dataclass(frozen=True, slots=True)
class Better(Check):
    """A candidate is better than a baseline at `times` the training length."""

    candidate: str
    baseline: str
    regime: Regime
    times: int = 1

    def find(self, evidence: Evidence) -> Finding | None:
        """Return the finding from the records, or None without records."""
        length = self.regime.length * self.times
        study = _study(evidence, self.regime)
        candidate, baseline = (
            _measured(study, arm, length) for arm in (self.candidate, self.baseline)
        )
        if study is None or candidate is None or baseline is None:
            return _failure(study, self.candidate, self.baseline)
        test = compare(candidate, length, baseline, length)
        seeds = len(_seeds(candidate) & _seeds(baseline))
        return Finding(
            outcome=_decided(test, 0.0, holds_below=True)
            if seeds
            else "not decidable at this scale",
            number=f"{self.candidate} {percent(test.difference)} against {self.baseline}"
            f" at {length:,} ({study.name}{_lost(study, self.candidate, self.baseline)})",
            seeds=seeds,
            test=test,
        )

    def moved(self, move: Callable[[Regime], Regime]) -> "Better":
        """Return the check in another regime."""
        return replace(self, regime=move(self.regime))


@dataclass(frozen=True, slots=True)
class Rise(Check):
    """The perplexity of an arm rises, or stays steady, up to `times` the training length."""

    arm: str
    regime: Regime
    times: int
    rises: bool
    corpus: str | None = None

    def find(self, evidence: Evidence) -> Finding | None:
        """Return the finding from the records, or None without records."""
        length = self.regime.length * self.times
        study = _study(evidence, self.regime, self.corpus)
        group = _measured(study, self.arm, length)
        if study is None or group is None:
            return _failure(study, self.arm)
        best = best_length(group, length)
        test = compare(group, length, group, best, MARGIN)
        return Finding(
            outcome=_decided(test, MARGIN, holds_below=not self.rises),
            number=f"{self.arm} {percent(test.difference)} at {length:,} over its best, at {best:,}"
            f" ({study.name}{_lost(study, self.arm)})",
            seeds=len(group.evaluations),
            test=test,
            margin=MARGIN,
        )

    def moved(self, move: Callable[[Regime], Regime]) -> "Rise":
        """Return the check in another regime, measured on the corpus of the regime."""
        return replace(self, regime=move(self.regime), corpus=None)


@dataclass(frozen=True, slots=True)
class Uses(Check):
    """An arm predicts far tokens better in a window with the last occurrence."""

    arm: str
    regime: Regime

    def find(self, evidence: Evidence) -> Finding | None:
        """Return the finding from the records, or None without records."""
        study = _study(evidence, self.regime)
        cells = [cell for cell in study.cells if cell.arm == self.arm] if study else []
        errors = study.errors if study else {}
        files = [cell.record.path / CONTEXT for cell in cells if cell.name not in errors]
        records = [context.load(file) for file in files if file.is_file()]
        if study is None or not records:
            return _failure(study, self.arm)
        lengths = records[0].lengths
        tokens, short, long = far_losses(records)
        seen = tokens > 0
        test = _over_documents(
            long[seen] / tokens[seen], short[seen] / tokens[seen], tokens[seen].astype(int)
        )
        return Finding(
            outcome=_decided(test, 0.0, holds_below=True),
            number=f"{self.arm} {percent(test.difference)} by windows of {lengths[-1]:,} over"
            f" {lengths[0]:,} on {tokens.sum():,.0f} far tokens"
            f" ({study.name}{_lost(study, self.arm)})",
            seeds=len(records),
            test=test,
        )

    def moved(self, move: Callable[[Regime], Regime]) -> "Uses":
        """Return the check in another regime."""
        return replace(self, regime=move(self.regime))


def far_losses(records: Sequence[ContextUse]) -> tuple[Documents, Documents, Documents]:
    """Return the far tokens by document, and their losses in the shortest and longest window.

    The losses are sums in nats, means over the records.
    """
    tallies = [record.tallies["pair"] for record in records]
    tokens = np.array(tallies[0].tokens, dtype=float)[1:-1].sum(axis=0)
    losses = np.mean([each.losses for each in tallies], axis=0)[:, 1:-1].sum(axis=1)
    return tokens, losses[0], losses[-1]


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence of the paper, with its section and the deciding checks."""

    text: str
    place: str
    checks: tuple[Check, ...]

    def moved(self, move: Callable[[Regime], Regime]) -> "Claim":
        """Return the claim in other regimes, measured on their own corpora."""
        checks = (each.moved(move) for each in self.checks)
        return replace(self, checks=tuple(dict.fromkeys(checks)))


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim, the outcome, and the findings of the checks."""

    claim: Claim
    outcome: Outcome
    findings: tuple[Finding, ...]

    @property
    def part(self) -> str:
        """Return the number of measured checks, unless all are measured."""
        measured, checks = len(self.findings), len(self.claim.checks)
        return f"{measured} of {checks} checks measured" if 0 < measured < checks else ""

    @property
    def weakest(self) -> Finding | None:
        """Return the finding with the least support, among findings equal to the outcome."""
        decisive = [each for each in self.findings if each.outcome == self.outcome]
        return min(decisive, key=_support, default=None)


def _support(finding: Finding) -> tuple[float, float]:
    """Return a key in the order of support: the smaller p, then the greater difference.

    Clear differences share the smallest p of a bootstrap. Failed arms and p-values that are NaN
    have the least support.
    """
    test = finding.test
    if test is None or math.isnan(test.p_value):
        return -math.inf, 0.0
    return -test.p_value, abs(test.difference - finding.margin)


def judge(claim: Claim, evidence: Evidence) -> Verdict:
    """Return the verdict on a claim."""
    found = [check.find(evidence) for check in claim.checks]
    findings = tuple(each for each in found if each is not None)
    outcomes = {each.outcome for each in findings}
    worst: list[Outcome] = [each for each in _FROM_THE_WORST if each in outcomes] or [
        "not measured"
    ]
    return Verdict(claim, worst[0], findings)


def compare(
    candidate: Group, length: int, baseline: Group, baseline_length: int, margin: float = 0.0
) -> PairedTest:
    """Return the test of mean loss (candidate at a length - baseline at another) = margin.

    The `difference` is the difference of losses, without the margin.
    """
    candidate, baseline = paired(candidate, baseline)
    ours, theirs = ({e.subject.seed: e for e in side.evaluations} for side in (candidate, baseline))
    seeds = sorted(seed for seed in ours.keys() & theirs.keys() if seed is not None)
    if len(seeds) >= SEEDS:
        test = paired_t(
            [ours[seed].by_length[length].loss - margin for seed in seeds],
            [theirs[seed].by_length[baseline_length].loss for seed in seeds],
        )
    else:
        rows = [
            np.mean([e.by_length[n].document_losses for e in side.evaluations], axis=0)
            for side, n in ((candidate, length), (baseline, baseline_length))
        ]
        tokens = np.array(candidate.evaluations[0].targets.tokens)
        test = _over_documents(rows[0] - margin, rows[1], tokens)
    return replace(test, difference=test.difference + margin)


def _over_documents(candidate: Documents, baseline: Documents, tokens: Tokens) -> PairedTest:
    """Return the bootstrap over documents, without a result for one document or none."""
    if len(tokens) >= 2:
        return paired_bootstrap(candidate, baseline, tokens)
    difference = float((candidate - baseline).mean()) if len(tokens) else math.nan
    return PairedTest("none over documents (fewer than 2)", len(tokens), difference, math.nan)


def best_length(group: Group, length: int) -> int:
    """Return the length below `length` with the lowest mean loss; NaN is above all losses."""
    first = group.evaluations[0]
    shorter = [n for n in first.by_length if n < length]
    losses = [np.mean([e.by_length[n].loss for e in group.evaluations]) for n in shorter]
    return shorter[int(np.argmin(np.nan_to_num(losses, nan=np.inf)))]


def _seeds(group: Group) -> set[int | None]:
    return {each.subject.seed for each in group.evaluations}


def _lost(study: Study, *arms: str) -> str:
    """Return the number of failed runs of arms in words, if any: the other runs are the luckier."""
    count = sum(cell.arm in arms and cell.name in study.errors for cell in study.cells)
    return f", runs failed: {count}" if count else ""


def _failure(study: Study | None, *arms: str) -> Finding | None:
    """Return the finding on arms without a finished run, if an arm has only failed runs."""
    if study is None:
        return None
    for arm in arms:
        errors = [study.errors.get(cell.name) for cell in study.cells if cell.arm == arm]
        if errors and all(errors):
            number = f"{arm} failed: {errors[0]} ({study.name})"
            return Finding("not decidable at this scale", number, len(errors), None)
    return None


def _decided(test: PairedTest, margin: float, holds_below: bool) -> Outcome:
    if test.few or not test.p_value < SIGNIFICANT:
        return "not decidable at this scale"
    return "reproduced" if (test.difference < margin) == holds_below else "not reproduced"


def _study(evidence: Evidence, regime: Regime, corpus: str | None = None) -> Study | None:
    place = regime, corpus or regime.corpus
    studies = (each for each in evidence if isinstance(each, Study))
    return next((each for each in studies if (each.regime, each.corpus) == place), None)


def _measured(study: Study | None, arm: str, length: int) -> Group | None:
    """Return an arm of a study if all runs were measured at a length."""
    group = study.group(arm) if study else None
    if group and all(length in each.by_length for each in group.evaluations):
        return group
    return None
