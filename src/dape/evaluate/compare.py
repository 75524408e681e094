"""Comparison of runs: seeds of a scheme form a group, and tests compare groups."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from dape.errors import UserError
from dape.evaluate.record import Evaluation, Recorded
from dape.evaluate.significance import (
    FEWEST_DOCUMENTS,
    PairedTest,
    paired_bootstrap,
    paired_t,
)
from dape.positions.scheme import ADAPTERS, BASES
from dape.text import one_line

METRICS = {"perplexity": "perplexity", "bits_per_byte": "bits per byte", "loss": "loss (nats)"}


Record = TypeVar("Record", bound=Recorded)


@dataclass(frozen=True, slots=True)
class Group:
    """Evaluations of a recipe with different training seeds."""

    label: str
    evaluations: tuple[Evaluation, ...]

    @property
    def scheme(self) -> str:
        """Return the scheme of the group."""
        return self.evaluations[0].subject.scheme

    @property
    def train_length(self) -> int | None:
        """Return the training length of the group."""
        return self.evaluations[0].subject.train_length

    @property
    def trained_on(self) -> str | None:
        """Return the checksum of the training corpus, None if not known of the first run."""
        return self.evaluations[0].subject.trained_on

    def values(self, metric: str) -> Float[np.ndarray, "seeds lengths"]:
        """Return a metric, such as `perplexity`, of every run at every length; NaN if refused."""
        rows = [
            [getattr(each.by_length.get(length), metric, np.nan) for length in each.lengths]
            for each in self.evaluations
        ]
        return np.array(rows, dtype=np.float64)

    @property
    def refused(self) -> dict[int, str]:
        """Return the lengths refused by a run, ascending, with the reasons."""
        reasons = {n: why for each in self.evaluations for n, why in each.refused.items()}
        return dict(sorted(reasons.items()))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two groups at a length; a test is None if the data do not allow the test.

    `difference` is the candidate's mean loss minus the baseline's, in nats. The t-test pairs runs
    by seed, with two shared seeds or more. The bootstrap pairs documents, 20 or more, with the loss
    of a document averaged over the runs of a group. All three compare the runs of `paired`, and
    `left_out` counts the runs of both groups left out.
    """

    candidate: str
    baseline: str
    length: int
    difference: float
    over_seeds: PairedTest | None
    over_documents: PairedTest | None
    left_out: int = 0


def group(evaluations: Sequence[Evaluation]) -> list[Group]:
    """Return the evaluations in groups by the labels of `gather`."""
    return [Group(label, tuple(members)) for label, members in gather(evaluations).items()]


def gather(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return records of runs by label, in order of appearance, without repeated runs.

    The label is the scheme. Runs that differ only in the seed share a label, each seed once, if
    trained on the same corpus and measured on the same tokens. If recipes or corpora differ but
    schemes agree, the label adds the training length, or else the name of the first run. A second
    training with the same recipe and seed is labelled by its name too.
    """
    found: dict[tuple[object, ...], list[Record]] = {}
    copies: Counter[tuple[object, ...]] = Counter()
    first = {each.subject.run: each for each in reversed(records)}
    runs = [first[run] for run in dict.fromkeys(each.subject.run for each in records)]
    known = {(_recipe(each), each.subject.trained_on) for each in runs if each.subject.trained_on}
    corpora = Counter(recipe for recipe, _ in known)
    for each in runs:
        recipe, seed = _recipe(each), each.subject.seed
        if corpora[recipe] > 1:
            recipe = (*recipe, each.subject.trained_on)
        found.setdefault((*recipe, copies[*recipe, seed]), []).append(each)
        copies[*recipe, seed] += 1
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


def _recipe(record: Recorded) -> tuple[object, ...]:
    """Return what seeds of a recipe have in common."""
    subject = record.subject
    alone = subject.run if subject.settings is None else None
    tokens = repr(getattr(record, "targets", None))
    return subject.scheme, subject.train_length, subject.settings, alone, tokens


def check_comparable(evaluations: Sequence[Evaluation], metric: str) -> None:
    """Check that a metric is comparable over the evaluations.

    Perplexity and loss count tokens and need equal targets, with equal text and tokenizer. Bits per
    byte need equal lengths and protocol.

    Raises:
        UserError: for evaluations that are not comparable.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        both = f"{other.subject.run} and {first.subject.run}"
        if other.lengths != first.lengths or other.targets.protocol != first.targets.protocol:
            raise UserError(
                f"{both} were evaluated at different lengths or by different protocols; run `dape "
                "eval` on all models together"
            )
        if metric != "bits_per_byte" and other.targets != first.targets:
            raise UserError(
                f"{metric} of {both} cannot be compared: the scored tokens differ (corpus, "
                "tokenizer, split, documents, --bos); run `dape eval` on all models together with "
                "the same --data, or compare --metric bits_per_byte"
            )


def compare(groups: Sequence[Group]) -> list[Comparison]:
    """Return the tests of each group against a baseline, at every length of both groups.

    The baseline of a scheme with an adapter is the scheme without the adapter, if measured, and of
    the same training length and corpus, if any is. Further groups have the first scheme without an
    adapter as baseline, or else the first scheme. Groups with targets different from the baseline's
    are left out.
    """
    comparisons = []
    for candidate in groups:
        baseline = _baseline(candidate, groups)
        if baseline is not candidate and _targets(candidate) == _targets(baseline):
            lengths = set(candidate.evaluations[0].lengths)
            measured = sorted(lengths - candidate.refused.keys() - baseline.refused.keys())
            comparisons += [_compare(candidate, baseline, length) for length in measured]
    return comparisons


def paired(candidate: Group, baseline: Group) -> tuple[Group, Group]:
    """Return two groups with the runs of `shared_seeds`."""
    ours, theirs = shared_seeds(candidate.evaluations, baseline.evaluations)
    return replace(candidate, evaluations=tuple(ours)), replace(baseline, evaluations=tuple(theirs))


def shared_seeds(
    first: Sequence[Record], second: Sequence[Record]
) -> tuple[Sequence[Record], Sequence[Record]]:
    """Return the records of seeds on both sides, or all records without any.

    A seed of a single side would change the difference by the luck of the seed.
    """
    seeds = [{each.subject.seed for each in side} for side in (first, second)]
    shared = (seeds[0] & seeds[1]) - {None}
    if not shared:
        return first, second
    ours, theirs = ([x for x in side if x.subject.seed in shared] for side in (first, second))
    return ours, theirs


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
    same.sort(
        key=lambda each: (
            each.train_length != candidate.train_length,
            each.trained_on != candidate.trained_on,
        )
    )
    bare = [each for each in groups if each.scheme == split(each.scheme)[1]]
    return [*same, *bare, *groups][0]


def _compare(candidate: Group, baseline: Group, length: int) -> Comparison:
    given = candidate, baseline
    candidate, baseline = paired(*given)
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
        left_out=sum(len(each.evaluations) for each in given)
        - sum(len(each.evaluations) for each in (candidate, baseline)),
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
