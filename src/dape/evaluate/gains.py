"""Gains of a longer window, and of an adapter, by the last occurrence of a token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from dape.errors import UserError
from dape.evaluate.compare import gather, shared_seeds, split
from dape.evaluate.context import ContextUse, Tally
from dape.evaluate.significance import RESAMPLES

INTERVAL = 0.95


@dataclass(frozen=True, slots=True)
class Gain:
    """The reduction of the loss in nats a token, over the `tokens` of a bin.

    `low` and `high` bound a 95 % interval by the percentile bootstrap over documents, and are None
    with fewer than two documents. `mean` is None without a token.
    """

    tokens: int
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Contrast:
    """The gain in each bin of the scheme `label`, over the scheme `base` or a shorter window."""

    label: str
    base: str | None
    gains: list[Gain]
    total: Gain

    @property
    def name(self) -> str:
        """Return both schemes."""
        return self.label if self.base is None else f"{self.label} over {self.base}"


def by_length(records: Sequence[ContextUse], occurrence: str) -> list[Contrast]:
    """Return the gain of the longest window over the shortest, by label and bin.

    The gain is a mean over the seeds of a label.
    """
    found = []
    for label, members in gather(records).items():
        first, *_, last = _mean_losses(members, occurrence)
        found.append(_contrast(label, None, members[0].tallies[occurrence], first, last))
    return found


def by_adapter(
    records: Sequence[ContextUse], occurrence: str, length: int | None = None
) -> list[Contrast]:
    """Return the gain of every scheme with an adapter over the scheme without, by bin.

    The gain is measured at a window length, by default the longest, and is a mean over the seeds
    that both labels have.
    """
    groups = gather(records)
    at = -1 if length is None else records[0].lengths.index(length)
    subjects = {label: members[0].subject for label, members in groups.items()}
    found = []
    for label, members in groups.items():
        own = subjects[label]
        adapter, encoding = split(own.scheme)
        bases = [
            each
            for each, subject in subjects.items()
            if (subject.scheme, subject.train_length) == (encoding, own.train_length)
        ]
        base = min(
            bases, key=lambda each: subjects[each].trained_on != own.trained_on, default=None
        )
        if adapter and base is not None:
            pair = shared_seeds(groups[base], members)
            before, after = (_mean_losses(side, occurrence)[at] for side in pair)
            found.append(_contrast(label, base, members[0].tallies[occurrence], before, after))
    return found


def _mean_losses(
    members: Sequence[ContextUse], occurrence: str
) -> Float[np.ndarray, "lengths bins documents"]:
    """Return the summed losses, the mean over records of seeds."""
    return np.mean([each.tallies[occurrence].losses for each in members], axis=0)


def _contrast(
    label: str,
    base: str | None,
    tally: Tally,
    before: Float[np.ndarray, "bins documents"],
    after: Float[np.ndarray, "bins documents"],
) -> Contrast:
    """Return the gains from a loss to a second loss, by bin and over all bins."""
    tokens, saved = np.array(tally.tokens), before - after
    *gains, total = (
        gain(*each)
        for each in zip([*saved, saved.sum(axis=0)], [*tokens, tokens.sum(axis=0)], strict=True)
    )
    return Contrast(label, base, gains, total)


def gain(saved: Float[np.ndarray, " documents"], tokens: Int[np.ndarray, " documents"]) -> Gain:
    """Return the mean saving a token, with an interval over documents."""
    count = int(tokens.sum())
    if not count:
        return Gain(0, None, None, None)
    mean = float(saved.sum() / count)
    if (tokens > 0).sum() < 2:
        return Gain(count, mean, None, None)
    drawn = _resamples(len(tokens))
    sums, counts = drawn @ saved, drawn @ tokens
    outside = (1 - INTERVAL) / 2
    low, high = np.quantile(sums[counts > 0] / counts[counts > 0], [outside, 1 - outside])
    return Gain(count, mean, float(low), float(high))


@lru_cache(maxsize=1)
def _resamples(documents: int) -> Int[np.ndarray, "resamples documents"]:
    """Return the counts of documents in many draws with replacement."""
    rng = np.random.default_rng(0)
    return rng.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES)


def check_comparable(records: Sequence[ContextUse]) -> None:
    """Check that all records score equal tokens.

    Raises:
        UserError: for records of different tokens.
    """
    first = records[0]
    for other in records[1:]:
        if (other.targets, other.lengths) != (first.targets, first.lengths):
            raise UserError(
                f"{other.subject.run} and {first.subject.run} were not scored on the same tokens "
                "at the same lengths; run `dape eval context` on all models together"
            )
