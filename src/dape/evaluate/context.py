"""Use of the context: does a model predict better for what stands far back, or only not worse?

Every scored token of the protocol `last` is sorted by the shortest window that holds an earlier
occurrence of it: of the token itself, or of the pair of it and the token before. The losses at
different window lengths, and of different models, are then compared in each such bin. A model that
uses far text gains on the tokens whose last occurrence only a longer window holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from dape.errors import UserError
from dape.evaluate.compare import gather, split
from dape.evaluate.perplexity import measure, token_losses, window_tokens
from dape.evaluate.record import Targets, evaluation_path, read, write
from dape.evaluate.runs import Plan, Run
from dape.evaluate.significance import RESAMPLES

FORMAT = 1
NEVER = 2**62  # tokens back: more than any text has, and a sum of two is no overflow
OCCURRENCES = {"token": "the token", "pair": "the token and the one before it"}
INTERVAL = 0.95


@dataclass(frozen=True, slots=True)
class Tally:
    """Scored tokens in bins: bin b holds those whose last occurrence needs window `lengths[b]`.

    The last bin holds those that do not occur in the longest window.

    tokens: their number, [bins][documents].
    losses: the sums of their losses in nats, [lengths][bins][documents].
    """

    tokens: list[list[int]]
    losses: list[list[list[float]]]


@dataclass(frozen=True, slots=True)
class ContextUse:
    """The losses of one model by place and occurrence; fields without a word as in `Evaluation`.

    positions: for each bin of positions in the longest window, the first and last number of tokens
        before the predicted one, and the mean loss.
    tallies: by a key of `OCCURRENCES`.
    """

    run: str
    scheme: str
    train_length: int | None
    seed: int | None
    settings: str | None
    parameters: int
    targets: Targets
    lengths: list[int]
    positions: list[tuple[int, int, float]]
    tallies: dict[str, Tally]
    provenance: dict[str, Any]
    format: int = field(default=FORMAT)

    def save(self) -> None:
        """Write the file of the run, whole or not at all."""
        write(context_path(Path(self.run), self.targets.split), self)


def context_path(run: Path, split: str) -> Path:
    """Return where the record of a run lies: `RUN/evaluation/context.json` for the test split."""
    return evaluation_path(run, "context", None, split)


def load(path: Path) -> ContextUse:
    """Read what `ContextUse.save` wrote.

    Raises:
        UserError: naming the command to run if there is none, or if another version wrote it.
    """
    content = read(
        path, "record of the use of the context", FORMAT, "run `dape eval context` on it"
    )
    content["targets"] = Targets(**content["targets"])
    content["positions"] = [tuple(each) for each in content["positions"]]
    content["tallies"] = {name: Tally(**each) for name, each in content["tallies"].items()}
    return ContextUse(**content)


def last_occurrence(symbols: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return how far before each symbol the same one stands last, `NEVER` where it does not."""
    order = np.argsort(symbols, kind="stable")
    earlier, later = order[:-1], order[1:]
    same = symbols[earlier] == symbols[later]
    distance = np.full(len(symbols), NEVER)
    distance[later[same]] = (later - earlier)[same]
    return distance


def window_needed(tokens: Int[np.ndarray, " fed"], scored: int) -> dict[str, Int[np.ndarray, "s"]]:
    """Return for each of the last `scored` tokens how long a window must be to hold it before.

    The window ends with the last but one of the `tokens`, as those of `last` do. The key `token`
    looks for the token, `pair` for the token after the same one as here.
    """
    after = np.arange(scored)[::-1]  # tokens of the window from the predicted one on
    pairs = tokens[:-1] * (tokens.max() + 1) + tokens[1:]
    found = {"token": last_occurrence(tokens), "pair": last_occurrence(pairs) + 1}
    return {name: distance[-scored:] + after for name, distance in found.items()}


def context_use(
    run: Run,
    plan: Plan,
    *,
    device: torch.device,
    batch_tokens: int,
    provenance: dict[str, Any],
    advance: Callable[[int], object] = lambda tokens: None,
) -> ContextUse:
    """Return the record of a run's model, for a plan of the protocol `last`.

    At the longest length all tokens of a window are scored, for the losses by position.

    Raises:
        UserError: if the model refuses a length, or memory runs out.
    """
    document = plan.corpus.split(plan.split).document
    *_, longest = windows = sorted(plan.windows, key=lambda each: each.length)
    model = run.load(device, longest.length)
    whole = replace(longest, scored=longest.length)
    with run.limits():
        losses = [
            token_losses(
                model,
                document,
                each,
                batch_tokens=batch_tokens,
                device=device,
                precision=run.precision(device),
                advance=advance,
            )
            for each in (*windows[:-1], whole)
        ]
    tokens = window_tokens(document, longest, slice(None))
    needed = [window_needed(row, longest.scored) for row in tokens]
    lengths = [each.length for each in windows]
    _, owner = np.unique(longest.documents, return_inverse=True)
    return ContextUse(
        **run.facts(model),
        targets=plan.targets,
        lengths=lengths,
        positions=measure(losses[-1], whole, np.array(plan.targets.bytes)).contexts,
        tallies={
            name: tally(
                np.stack([each[name] for each in needed]),
                [each[:, -longest.scored :] for each in losses],
                owner,
                lengths,
            )
            for name in OCCURRENCES
        },
        provenance=provenance,
    )


def tally(
    needed: Int[np.ndarray, "windows scored"],
    losses: Sequence[Float[np.ndarray, "windows scored"]],
    owner: Int[np.ndarray, " windows"],
    lengths: Sequence[int],
) -> Tally:
    """Return tokens and losses by bin and document; `owner` is the document of each window."""
    shape = len(lengths) + 1, int(owner.max()) + 1
    cell = (np.searchsorted(lengths, needed) * shape[1] + owner[:, None]).ravel()

    def summed(values: Any) -> Any:
        return np.bincount(cell, values, shape[0] * shape[1]).reshape(shape)

    return Tally(
        tokens=summed(None).tolist(),
        losses=[summed(each.ravel().astype(np.float64)).tolist() for each in losses],
    )


@dataclass(frozen=True, slots=True)
class Gain:
    """By how many nats a token the loss is lower, over `tokens` of one bin.

    `low` and `high` bound a 95 % interval by the percentile bootstrap over documents, None for
    fewer than two documents; `mean` is None without a token.
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
    """Return for each label what the longest window gains over the shortest, in each bin.

    Seeds of a label are averaged.
    """
    found = []
    for label, members in gather(records).items():
        first, *_, last = _mean_losses(members, occurrence)
        found.append(_contrast(label, None, members[0].tallies[occurrence], first, last))
    return found


def by_adapter(
    records: Sequence[ContextUse], occurrence: str, length: int | None = None
) -> list[Contrast]:
    """Return what each scheme with an adapter gains over the same encoding without, in each bin.

    At a window length, by default the longest. Seeds of a label are averaged.
    """
    groups = gather(records)
    at = -1 if length is None else records[0].lengths.index(length)
    trained = {
        (members[0].scheme, members[0].train_length): label for label, members in groups.items()
    }
    found = []
    for label, members in groups.items():
        adapter, encoding = split(members[0].scheme)
        base = trained.get((encoding, members[0].train_length))
        if adapter and base is not None:
            before, after = (_mean_losses(groups[name], occurrence)[at] for name in (base, label))
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
    """Return the gains from one loss to another, in each bin and over all of them."""
    tokens, saved = np.array(tally.tokens), before - after
    *gains, total = (
        gain(*each)
        for each in zip([*saved, saved.sum(axis=0)], [*tokens, tokens.sum(axis=0)], strict=True)
    )
    return Contrast(label, base, gains, total)


def gain(
    saved: Float[np.ndarray, " documents"], tokens: Int[np.ndarray, " documents"], seed: int = 0
) -> Gain:
    """Return the mean saving a token, and its interval over documents."""
    count = int(tokens.sum())
    if not count:
        return Gain(0, None, None, None)
    mean = float(saved.sum() / count)
    if (tokens > 0).sum() < 2:
        return Gain(count, mean, None, None)
    drawn = _resamples(len(tokens), seed)
    sums, counts = drawn @ saved, drawn @ tokens
    outside = (1 - INTERVAL) / 2
    low, high = np.quantile(sums[counts > 0] / counts[counts > 0], [outside, 1 - outside])
    return Gain(count, mean, float(low), float(high))


@lru_cache(maxsize=1)
def _resamples(documents: int, seed: int) -> Int[np.ndarray, "resamples documents"]:
    """Return how often each document is drawn, in each of as many draws with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES)


def check_comparable(records: Sequence[ContextUse]) -> None:
    """Raise a `UserError` unless all of the records are about the same tokens."""
    first = records[0]
    for other in records[1:]:
        if (other.targets, other.lengths) != (first.targets, first.lengths):
            raise UserError(
                f"{other.run} and {first.run} were not scored on the same tokens at the same "
                "lengths; run `dape eval context` on all of them together"
            )
