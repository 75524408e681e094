"""Runs side by side: seeds of one scheme as a group, groups against each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float

from dape.errors import UserError
from dape.evaluate.record import Evaluation
from dape.evaluate.significance import (
    FEWEST_DOCUMENTS,
    PairedTest,
    paired_bootstrap,
    paired_t,
)
from dape.evaluate.subject import Subject
from dape.positions.scheme import ADAPTERS, BASES
from dape.text import one_line

METRICS = {"perplexity": "perplexity", "bits_per_byte": "bits per byte", "loss": "loss (nats)"}


@runtime_checkable
class Recorded(Protocol):
    """A record of a measurement, which says what was measured."""

    @property
    def subject(self) -> Subject:
        """The model."""


Record = TypeVar("Record", bound=Recorded)


@dataclass(frozen=True, slots=True)
class Group:
    """Evaluations of one recipe that differ in nothing but the training seed."""

    label: str
    evaluations: tuple[Evaluation, ...]

    @property
    def scheme(self) -> str:
        """Return the scheme that all of them have."""
        return self.evaluations[0].subject.scheme

    @property
    def train_length(self) -> int | None:
        """Return the length that all of them were trained at."""
        return self.evaluations[0].subject.train_length

    def values(self, metric: str) -> Float[np.ndarray, "seeds lengths"]:
        """Return a metric, such as `perplexity`, of every run at every length; NaN if refused."""
        rows = [
            [getattr(each.by_length.get(length), metric, np.nan) for length in each.lengths]
            for each in self.evaluations
        ]
        return np.array(rows, dtype=np.float64)

    @property
    def refused(self) -> dict[int, str]:
        """Return the lengths that a run of them refused, ascending, and why."""
        reasons = {n: why for each in self.evaluations for n, why in each.refused.items()}
        return dict(sorted(reasons.items()))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two groups at one length; a test that the data do not allow is None.

    `difference` is the candidate's mean loss over its runs less the baseline's. The t-test pairs
    runs by seed (two shared seeds or more). The bootstrap pairs documents (20 or more), with each
    document's loss averaged over the runs of a group.
    """

    candidate: str
    baseline: str
    length: int
    difference: float
    over_seeds: PairedTest | None
    over_documents: PairedTest | None


def group(evaluations: Sequence[Evaluation]) -> list[Group]:
    """Return the evaluations in groups, as `gather` labels them."""
    return [Group(label, tuple(members)) for label, members in gather(evaluations).items()]


def gather(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return records of runs by label, their scheme, in order of appearance; each run once.

    Runs that differ in nothing but their seed share a label. Where two labels would be the same
    scheme, the length trained at tells them apart, or else the name of the first run.
    """
    found: dict[tuple[object, ...], list[Record]] = {}
    first = {each.subject.run: each for each in reversed(records)}
    for run in dict.fromkeys(each.subject.run for each in records):
        each, subject = first[run], first[run].subject
        alone = run if subject.settings is None else None
        key = (subject.scheme, subject.train_length, subject.settings, alone)
        found.setdefault(key, []).append(each)
    schemes = [scheme for scheme, *_ in found]
    trained = [(scheme, length) for scheme, length, *_ in found]
    labelled = {}
    for (scheme, length, *_), members in found.items():
        label = str(scheme)
        if schemes.count(scheme) > 1:
            apart = length is not None and trained.count((scheme, length)) == 1
            label += f" at {length:,}" if apart else f" ({members[0].subject.run})"
        labelled[one_line(label)] = members
    return labelled


def check_comparable(evaluations: Sequence[Evaluation], metric: str) -> None:
    """Raise a `UserError` unless the metric means the same in all of the evaluations.

    Perplexity and loss count tokens, so that they need the same text under the same tokenizer: the
    same targets. Bits per byte need the same lengths and protocol only.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        both = f"{other.subject.run} and {first.subject.run}"
        if other.lengths != first.lengths or other.targets.protocol != first.targets.protocol:
            raise UserError(
                f"{both} were evaluated at different lengths or by different protocols; run `dape "
                "eval` on all of them together"
            )
        if metric != "bits_per_byte" and other.targets != first.targets:
            raise UserError(
                f"{metric} of {both} cannot be compared: they score different tokens (corpus, "
                "tokenizer, split, documents, --bos); run `dape eval` on all of them together with "
                "one --data, or compare --metric bits_per_byte"
            )


def compare(groups: Sequence[Group]) -> list[Comparison]:
    """Return the tests of each group against its baseline, at every length neither refused.

    The baseline of a scheme with an adapter is the same encoding without one, if that is there;
    that of all others is the first scheme without an adapter, or else the first. Groups that score
    other tokens than their baseline are left out.
    """
    comparisons = []
    for candidate in groups:
        baseline = _baseline(candidate, groups)
        if baseline is not candidate and _targets(candidate) == _targets(baseline):
            lengths = set(candidate.evaluations[0].lengths)
            measured = sorted(lengths - candidate.refused.keys() - baseline.refused.keys())
            comparisons += [_compare(candidate, baseline, length) for length in measured]
    return comparisons


def split(scheme: str) -> tuple[str, str]:
    """Return the adapter ("" for none) and the encoding in the name of a scheme."""
    for adapter in ADAPTERS:
        encoding = scheme.removeprefix(f"{adapter}-")
        if encoding != scheme and encoding in BASES:
            return adapter, encoding
    return "", scheme


def _targets(group: Group) -> object:
    return group.evaluations[0].targets


def _baseline(candidate: Group, groups: Sequence[Group]) -> Group:
    adapter, encoding = split(candidate.scheme)
    same = [each for each in groups if adapter and each.scheme == encoding]
    bare = [each for each in groups if each.scheme == split(each.scheme)[1]]
    return [*same, *bare, *groups][0]


def _compare(candidate: Group, baseline: Group, length: int) -> Comparison:
    ours, theirs = (
        np.mean([each.by_length[length].loss for each in side.evaluations])
        for side in (candidate, baseline)
    )
    return Comparison(
        candidate=candidate.label,
        baseline=baseline.label,
        length=length,
        difference=float(ours - theirs),
        over_seeds=_over_seeds(candidate, baseline, length),
        over_documents=_over_documents(candidate, baseline, length),
    )


def _over_seeds(candidate: Group, baseline: Group, length: int) -> PairedTest | None:
    losses = [
        {each.subject.seed: each.by_length[length].loss for each in side.evaluations}
        for side in (candidate, baseline)
    ]
    shared = sorted(seed for seed in losses[0].keys() & losses[1].keys() if seed is not None)
    if len(shared) < 2:
        return None
    return paired_t([losses[0][seed] for seed in shared], [losses[1][seed] for seed in shared])


def _over_documents(candidate: Group, baseline: Group, length: int) -> PairedTest | None:
    tokens = np.array(candidate.evaluations[0].targets.tokens)
    if len(tokens) < FEWEST_DOCUMENTS:
        return None
    return paired_bootstrap(
        _document_losses(candidate, length), _document_losses(baseline, length), tokens
    )


def _document_losses(group: Group, length: int) -> Float[np.ndarray, " documents"]:
    rows = [each.by_length[length].document_losses for each in group.evaluations]
    return np.mean(rows, axis=0)
