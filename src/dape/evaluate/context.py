"""Use of the context: the gain of a model from repetitions far back in a window.

Every scored token of the protocol `last` is sorted into a bin, by the shortest window that holds an
earlier occurrence. An occurrence is the token, or the pair of the token and its predecessor. Within
a bin, losses are compared over window lengths and models. A model that uses far text gains on
tokens whose last occurrence lies beyond the shorter window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from dape.data.shards import Corpus
from dape.device import choose_device, device_of
from dape.errors import UserError, check_whole
from dape.evaluate.lengths import chosen_lengths
from dape.evaluate.opening import Given, note_unchecked, open_models
from dape.evaluate.perplexity import measure, token_losses, window_tokens
from dape.evaluate.plan import Plan, plan
from dape.evaluate.protocols import protocol
from dape.evaluate.record import Targets, restore, save
from dape.evaluate.results import KEPT, Kept, origins, results_folders
from dape.evaluate.subject import PRECISIONS, Model, Subject
from dape.evaluate.watch import SILENT, Watch
from dape.provenance import Provenance
from dape.strict import Number

FORMAT = 1
Losses = Float[np.ndarray, "windows scored"]
NEVER = 2**62  # tokens back: more than any text has, and the sum of two does not overflow
OCCURRENCES = {"token": "the token", "pair": "the token and the token before"}


@dataclass(frozen=True, slots=True)
class Tally:
    """Scored tokens by the window of their last occurrence.

    Bin b holds tokens whose last occurrence needs the window `lengths[b]`. The last bin holds
    tokens without an occurrence in the longest window.

    Attributes:
        tokens: number of tokens, [bins][documents].
        losses: sums of the losses in nats, [lengths][bins][documents].
    """

    tokens: list[list[int]]
    losses: list[list[list[Number]]]


@dataclass(frozen=True, slots=True)
class ContextUse:
    """The losses of a model by position and by last occurrence.

    Attributes:
        subject: the model.
        targets: the scored tokens.
        lengths: window lengths in tokens, ascending. An unfinished record has losses of the first
            lengths only.
        positions: the first and last number of earlier tokens, and the mean loss in nats, for each
            bin of positions in the longest window.
        tallies: a `Tally` for each key of `OCCURRENCES`.
        provenance: command, commit, versions and device.
        format: version of the file format.
    """

    subject: Subject
    targets: Targets
    lengths: list[int]
    positions: list[tuple[int, int, Number]]
    tallies: dict[str, Tally]
    provenance: Provenance
    format: int = field(default=FORMAT)

    def __post_init__(self) -> None:
        """Refuse a single length, and numbers of other lengths, bins or documents."""
        if len(self.lengths) < 2 or self.lengths != sorted(set(self.lengths)):
            raise UserError(f"lengths {self.lengths}: give two lengths or more, to compare")
        if self.tallies.keys() != OCCURRENCES.keys():
            raise UserError(f"tallies of {[*self.tallies]}, not of {[*OCCURRENCES]}")
        shape = len(self.lengths) + 1, len(self.targets.documents)
        for name, each in self.tallies.items():
            if any(np.array(sums).shape != shape for sums in (each.tokens, *each.losses)):
                raise UserError(f"the tally of {name} has not each bin and document")

    @property
    def measured(self) -> list[int]:
        """Return the lengths that have losses."""
        return self.lengths[: min(len(each.losses) for each in self.tallies.values())]

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        save(path, self)


def load(path: Path) -> ContextUse:
    """Read a file of `ContextUse.save`.

    Raises:
        UserError: naming the command to run, for a missing file or a file of another version.
    """
    kind, remedy = "record of the use of the context", "run `dape eval context` on the model"
    return restore(path, kind, FORMAT, remedy, ContextUse)


def last_occurrence(symbols: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return the distance to the last equal symbol before each symbol, `NEVER` without any."""
    order = np.argsort(symbols, kind="stable")
    earlier, later = order[:-1], order[1:]
    same = symbols[earlier] == symbols[later]
    distance = np.full(len(symbols), NEVER)
    distance[later[same]] = (later - earlier)[same]
    return distance


def window_needed(tokens: Int[np.ndarray, " fed"], scored: int) -> dict[str, Int[np.ndarray, "s"]]:
    """Return the shortest window with an earlier occurrence, for each of the last `scored` tokens.

    The window ends with the last but one of the `tokens`, as in the protocol `last`. The key
    `token` looks for the token, and `pair` for the token with the same predecessor.
    """
    after = np.arange(scored)[::-1]  # tokens of the window from the predicted token on
    pairs = tokens[:-1] * (tokens.max() + 1) + tokens[1:]
    found = {"token": last_occurrence(tokens), "pair": last_occurrence(pairs) + 1}
    return {name: distance[-scored:] + after for name, distance in found.items()}


def evaluate_context(
    models: Given | Sequence[Given],
    corpus: str | Path | Corpus | None = None,
    lengths: Sequence[int] | None = None,
    *,
    split: str = "test",
    documents: int = 100,
    blocks: int = 4,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    batch_tokens: int = 16384,
    out: str | Path | None = None,
    again: bool = False,
    partial_weights: bool = False,
    command: str = "dape.evaluate.evaluate_context",
    watch: Watch = SILENT,
) -> list[ContextUse]:
    """Return the use of the context by each model: losses by position and by last occurrence.

    `dape.evaluate.evaluate` explains the arguments. The file receives each length as soon as the
    length is measured. A repeated call for equal lengths resumes behind the last finished length.

    Raises:
        UserError: as `evaluate`, and for models trained on different corpora.
    """
    check_whole(0, seed=seed)
    check_whole(documents=documents, blocks=blocks, batch_tokens=batch_tokens)
    opened = open_models(models, partial_weights=partial_weights, watch=watch)
    asked = chosen_lengths(lengths, opened)
    corpora = {each.checksum: each for each in (model.corpus(corpus) for model in opened)}
    if len(corpora) > 1:
        raise UserError("the runs were trained on different corpora; give --data")
    (text,) = corpora.values()
    rule = protocol("last", asked)
    planned = plan(text, split, rule, asked, documents=documents, blocks=blocks, seed=seed)
    chosen = choose_device(device)
    made = origins(opened, chosen, precision, command=command, seed=seed)
    found = []
    with results_folders(opened, out, lambda each: [each.context(split)]) as folders:
        watch.begin(planned.tokens * len(opened))
        for model, folder, origin in zip(opened, folders, made, strict=True):
            kept = Kept(folder.context(split) if folder else None, load)
            kept.note_lost(model, watch, origin, lambda each: _alike(each, planned))
            done = None if again else _before(kept, model, planned, origin)
            for windows in planned.windows[: len(done.measured) if done else 0]:
                watch.announce(str(model.folder), windows.length, KEPT)
                watch.advance(windows.tokens)
            record = context_use(
                model,
                planned,
                device=chosen,
                batch_tokens=batch_tokens,
                provenance=origin,
                advance=watch.advance,
                done=done,
                keep=kept.keep,
            )
            kept.finish(record)
            found.append(record)
    note_unchecked(opened, watch)
    return found


def _before(
    kept: Kept[ContextUse], model: Model, plan: Plan, origin: dict[str, Any]
) -> ContextUse | None:
    """Return what was measured before of the same model and windows, the same way."""
    found = kept.before(model, origin, lambda each: _alike(each, plan))
    most = max(found, key=lambda each: len(each.measured), default=None)
    return None if most is None else replace(most, provenance=origin)


def _alike(before: ContextUse, plan: Plan) -> bool:
    """Return whether an earlier record has the same windows."""
    lengths = [windows.length for windows in plan.windows]
    return (before.targets, before.lengths) == (plan.targets, lengths)


def context_use(
    model: Model,
    plan: Plan,
    *,
    device: torch.device,
    batch_tokens: int,
    provenance: dict[str, Any],
    advance: Callable[[int], object] = lambda tokens: None,
    done: ContextUse | None = None,
    keep: Callable[[ContextUse], object] = lambda record: None,
) -> ContextUse:
    """Return the record of a model, for a plan of the protocol `last`.

    At the longest length all tokens of a window are scored, for the losses by position. `done`
    holds the losses of the first lengths, if any, and `keep` gets the record after each length. The
    provenance says the precision of products.

    Raises:
        UserError: if the model refuses a length, or memory runs out.
    """
    *shorter, longest = plan.windows
    whole = replace(longest, scored=longest.length)
    tallied = _tallies(plan)
    if done is not None and done.measured == done.lengths:
        return done
    precision = provenance["precision"]
    with (
        model.loaded(device, longest.length, precision) as network,
        model.refusing(network),
    ):
        if done is None:
            lengths = [each.length for each in plan.windows]
            subject = model.subject(network)
            done = ContextUse(subject, plan.targets, lengths, [], tallied([]), provenance)
        for windows in (*shorter, whole)[len(done.measured) :]:
            losses = token_losses(
                network,
                plan.corpus.split(plan.split).document,
                windows,
                batch_tokens=batch_tokens,
                device=device_of(network, device),
                precision=PRECISIONS[precision],
                advance=advance,
            )
            done = replace(
                done,
                positions=measure(losses, whole, plan.bytes).contexts if windows is whole else [],
                tallies=_joined(done.tallies, tallied([losses[:, -longest.scored :]])),
            )
            keep(done)
    return done


def _tallies(plan: Plan) -> Callable[[Sequence[Losses]], dict[str, Tally]]:
    """Return the function from losses of lengths to their tallies, for the tokens of a plan."""
    *_, longest = plan.windows
    tokens = window_tokens(plan.corpus.split(plan.split).document, longest, slice(None))
    rows = [window_needed(row, longest.scored) for row in tokens]
    needed = {name: np.stack([row[name] for row in rows]) for name in OCCURRENCES}
    _, owner = np.unique(longest.documents, return_inverse=True)
    lengths = [each.length for each in plan.windows]
    return lambda losses: {
        name: tally(needed[name], losses, owner, lengths) for name in OCCURRENCES
    }


def _joined(before: dict[str, Tally], after: dict[str, Tally]) -> dict[str, Tally]:
    return {
        name: Tally(each.tokens, before[name].losses + each.losses) for name, each in after.items()
    }


def tally(
    needed: Int[np.ndarray, "windows scored"],
    losses: Sequence[Losses],
    owner: Int[np.ndarray, " windows"],
    lengths: Sequence[int],
) -> Tally:
    """Return tokens and losses by bin and document; `owner` gives the document of a window."""
    shape = len(lengths) + 1, int(owner.max()) + 1
    cell = (np.searchsorted(lengths, needed) * shape[1] + owner[:, None]).ravel()

    def summed(values: Any) -> Any:
        return np.bincount(cell, values, shape[0] * shape[1]).reshape(shape)

    return Tally(
        tokens=summed(None).tolist(),
        losses=[summed(each.ravel().astype(np.float64)).tolist() for each in losses],
    )
