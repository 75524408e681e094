"""Retrieval: a number hidden at a depth of a long text, asked for at the end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from dape.data.shards import Corpus
from dape.data.tokenizer import fingerprint
from dape.device import choose_device, device_of
from dape.errors import UserError, check_finite, check_whole, unknown
from dape.evaluate.lengths import chosen_lengths
from dape.evaluate.opening import Given, open_models
from dape.evaluate.prompts import TASKS, Prompts, needle, passkey
from dape.evaluate.record import restore, save
from dape.evaluate.results import KEPT, Kept, origins, results_folders
from dape.evaluate.subject import PRECISIONS, Model, Subject
from dape.evaluate.trials import Cell, Plan, retrieve
from dape.evaluate.watch import SILENT, Watch
from dape.provenance import Provenance
from dape.runs import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The results of a model on a task.

    Attributes:
        subject: the model.
        task: `passkey` or `needle`.
        data: checksum of the corpus around a needle.
        plan: lengths, depths, trials and seed.
        cells: scores by length and depth.
        refused: the reason for each length refused by the model or the prompt.
        provenance: command, commit, versions and device.
        split: split of the corpus around a needle.
        tokenizer: fingerprint of the tokenizer of a passkey, None in records of earlier versions.
        format: version of the file format.
    """

    subject: Subject
    task: str
    data: str | None
    plan: Plan
    cells: list[Cell]
    refused: dict[int, str]
    provenance: Provenance
    split: str | None = None
    tokenizer: str | None = None
    format: int = FORMAT

    def values(self, metric: str) -> Float[np.ndarray, "depths lengths"]:
        """Return a metric, such as `exact`, at every depth and length; NaN if refused."""
        found = {(cell.depth, cell.length): getattr(cell, metric) for cell in self.cells}
        rows = [
            [found.get((depth, length), np.nan) for length in self.plan.lengths]
            for depth in self.plan.depths
        ]
        return np.array(rows, dtype=np.float64)

    @property
    def lengths(self) -> set[int]:
        """Return the measured or refused lengths."""
        return {cell.length for cell in self.cells} | self.refused.keys()

    def with_cells(self, cells: Sequence[Cell], refused: Mapping[int, str]) -> "Retrieval":
        """Return the record with new cells, in the order of the plan, and new refusals."""
        ordered = sorted(cells, key=lambda cell: (cell.length, self.plan.depths.index(cell.depth)))
        return replace(self, cells=ordered, refused=dict(sorted(refused.items())))

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        save(path, self)


def load(path: Path) -> Retrieval:
    """Read a file of `Retrieval.save`.

    Raises:
        UserError: naming the command to run, for a file that is missing, damaged or of another
            version.
    """
    remedy = f"run `dape eval retrieval --tasks {path.stem}` on the model"
    return restore(path, "retrieval", FORMAT, remedy, Retrieval)


def evaluate_retrieval(
    models: Given | Sequence[Given],
    tasks: Sequence[str] = ("passkey",),
    lengths: Sequence[int] | None = None,
    corpus: str | Path | Corpus | None = None,
    *,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 10,
    split: str = "test",
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    batch_tokens: int = 16384,
    out: str | Path | None = None,
    again: bool = False,
    partial_weights: bool = False,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    command: str = "dape.evaluate.evaluate_retrieval",
    watch: Watch = SILENT,
) -> list[Retrieval]:
    """Return the success of each model at finding a number hidden in a long text.

    `dape.evaluate.evaluate` explains the further arguments.

    Args:
        models: run folders, folders or hub names of causal language models, modules in memory.
        tasks: `passkey`, `needle` (`dape.evaluate.prompts`).
        lengths: tokens of a prompt.
        corpus: the prepared corpus around a needle.
        depths: fractions of the text before the number, from 0 to 1.
        trials: numbers per length and depth, drawn by `seed`.

    Returns:
        A record for each model and task.

    Raises:
        UserError: for an unknown task, a model without a tokenizer, unwritable results, or too
            little memory.
    """
    check_whole(0, seed=seed)
    check_whole(trials=trials, batch_tokens=batch_tokens)
    for depth in depths:
        check_finite(0, depth=depth)
        if depth > 1:
            raise UserError(f"depth={depth} must be at most 1")
    for name in tasks:
        if name not in TASKS:
            raise unknown("task", name, TASKS)
    opened = open_models(models, tokenizer, partial_weights, watch)
    asked = tuple(chosen_lengths(lengths, opened))
    plan = Plan(asked, tuple(dict.fromkeys(map(float, depths))), trials, seed)
    names = list(dict.fromkeys(tasks))
    prompts = [{name: _prompts(model, name, corpus, split) for name in names} for model in opened]
    chosen = choose_device(device)
    made = origins(opened, chosen, precision, command=command, seed=seed)
    with results_folders(
        opened, out, lambda each: [each.retrieval(name) for name in names]
    ) as folders:
        watch.begin(plan.tokens * len(names) * len(opened))
        return [
            record
            for model, own, folder, its in zip(opened, prompts, folders, made, strict=True)
            for record in _Session(model, plan, folder, chosen, batch_tokens, its, watch).run(
                own, again
            )
        ]


@dataclass(frozen=True, slots=True)
class _Session:
    """The prompts of a plan for a model; results are kept in `folder`, if given."""

    model: Model
    plan: Plan
    folder: RunFolder | None
    device: torch.device
    batch_tokens: int
    origin: dict[str, Any]
    watch: Watch

    def run(self, prompts: "Mapping[str, _Asked]", again: bool) -> list[Retrieval]:
        """Return a record for each task, with earlier measurements unless `again`."""
        longest, precision = max(self.plan.lengths), self.origin["precision"]
        with self.model.on_demand(self.device, longest, precision) as network:
            return [self._record(task, asked, again, network) for task, asked in prompts.items()]

    def _record(
        self, task: str, asked: "_Asked", again: bool, network: Callable[[], nn.Module]
    ) -> Retrieval:
        kept = Kept(self.folder.retrieval(task) if self.folder else None, load)
        kept.note_lost(
            self.model, self.watch, self.origin, lambda each: self._within(each, task, asked)
        )
        done = None if again else self._before(kept, task, asked)
        if done is None:
            done = self._empty(network(), task, asked)
        for length in self.plan.lengths:
            if length not in done.lengths:
                done = self._with(done, length, asked, network())
                kept.keep(done)
        kept.finish(done)
        return done

    def _empty(self, network: nn.Module, task: str, asked: "_Asked") -> Retrieval:
        subject = self.model.subject(network)
        return Retrieval(
            subject, task, asked.data, self.plan, [], {}, self.origin, asked.split, asked.tokenizer
        )

    def _with(self, done: Retrieval, length: int, asked: "_Asked", network: nn.Module) -> Retrieval:
        """Return the record with a further length."""
        with self.model.refusing(network):
            cells, refused = retrieve(
                network,
                asked.prompts,
                replace(self.plan, lengths=(length,)),
                device=device_of(network, self.device),
                batch_tokens=self.batch_tokens,
                precision=PRECISIONS[self.origin["precision"]],
                advance=self.watch.advance,
                announce=partial(self.watch.announce, f"{self.model.folder}  {done.task}"),
            )
        return done.with_cells([*done.cells, *cells], {**done.refused, **refused})

    def _before(self, kept: Kept[Retrieval], task: str, asked: "_Asked") -> Retrieval | None:
        """Return earlier measurements of the same model and prompts, with the same settings."""
        found = kept.before(self.model, self.origin, lambda each: self._alike(each, task, asked))
        if not found:
            return None
        known = {n for each in found for n in each.lengths} & {*self.plan.lengths}
        cells = {(c.length, c.depth): c for each in found for c in each.cells if c.length in known}
        refused = {n: why for each in found for n, why in each.refused.items() if n in known}
        for length in sorted(known):
            self.watch.announce(f"{self.model.folder}  {task}", length, KEPT)
            self.watch.advance(length * len(self.plan.depths) * self.plan.trials)
        before = replace(
            found[-1], plan=self.plan, provenance=self.origin, tokenizer=asked.tokenizer
        )
        return before.with_cells(list(cells.values()), refused)

    def _alike(self, before: Retrieval, task: str, asked: "_Asked") -> bool:
        """Return whether an earlier record has the same prompts, perhaps of other lengths.

        A record of an earlier version names no tokenizer.
        """
        return (
            (before.task, before.data, before.split) == (task, asked.data, asked.split)
            and before.tokenizer in (None, asked.tokenizer)
            and replace(before.plan, lengths=self.plan.lengths) == self.plan
        )

    def _within(self, before: Retrieval, task: str, asked: "_Asked") -> bool:
        """Return whether the plan has all prompts of an earlier record."""
        return self._alike(before, task, asked) and {*before.lengths} <= {*self.plan.lengths}


class _Asked(NamedTuple):
    """The prompts of a task, the corpus and the split of a needle, the tokenizer of a passkey."""

    prompts: Prompts
    data: str | None = None
    split: str | None = None
    tokenizer: str | None = None


def _prompts(model: Model, task: str, corpus: str | Path | Corpus | None, split: str) -> _Asked:
    """Return the prompts of a task for a model."""
    if task == "needle":
        text = model.corpus(corpus)
        return _Asked(needle(text.tokenizer(), text, split), text.checksum, split)
    tokenizer = model.tokenizer()
    if tokenizer is None:
        raise UserError(f"{model.source} has no tokenizer.json; a passkey needs a tokenizer")
    return _Asked(passkey(tokenizer), tokenizer=fingerprint(tokenizer))
