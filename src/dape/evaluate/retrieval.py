"""Retrieval: a number hidden at a depth of a long text, asked for at the end."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int

from dape.data.shards import Corpus
from dape.device import choose_device, device_of
from dape.errors import UserError, unknown
from dape.evaluate.lengths import default_lengths
from dape.evaluate.opening import Given, open_models
from dape.evaluate.prompts import TASKS, Prompt, Prompts, needle, passkey
from dape.evaluate.record import restore, save
from dape.evaluate.refusal import Refused, explained
from dape.evaluate.results import results_folders
from dape.evaluate.subject import Model, Subject
from dape.evaluate.watch import SILENT, Watch
from dape.provenance import provenance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
Answer = tuple[Int[np.ndarray, " answer"], Float[np.ndarray, " answer"]]


@dataclass(frozen=True, slots=True)
class Cell:
    """Scores of the trials at a length and a depth.

    The rank of a token of the answer is the number of tokens at least as likely, given the earlier
    tokens of the answer. Rank 1 is the best.

    Attributes:
        length: tokens of the prompt.
        depth: fraction of the text before the number, from 0 to 1.
        exact: fraction of the trials in which greedy decoding gives the whole number.
        accuracy: fraction of the answers' tokens with rank 1.
        rank: mean rank of the answers' tokens.
        log_probability: mean log-probability of the whole number, in nats.
    """

    length: int
    depth: float
    exact: float
    accuracy: float
    rank: float
    log_probability: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The trials: `trials` numbers at each length and depth, drawn by `seed`."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int

    @property
    def tokens(self) -> int:
        """Return how many tokens a model is fed."""
        return sum(self.lengths) * len(self.depths) * self.trials


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The results of a model on a task.

    Attributes:
        subject: the model.
        task: `passkey` or `needle`.
        data: checksum of the corpus around a needle.
        plan: lengths, depths, trials and seed.
        cells: scores, for each length and depth.
        refused: the reason for each length that the model or the prompt refused.
        provenance: command, commit, versions and device.
        format: version of the file format.
    """

    subject: Subject
    task: str
    data: str | None
    plan: Plan
    cells: list[Cell]
    refused: dict[int, str]
    provenance: dict[str, Any]
    format: int = FORMAT

    def values(self, metric: str) -> Float[np.ndarray, "depths lengths"]:
        """Return a metric, such as `exact`, at every depth and length; NaN if refused."""
        found = {(cell.depth, cell.length): getattr(cell, metric) for cell in self.cells}
        rows = [
            [found.get((depth, length), np.nan) for length in self.plan.lengths]
            for depth in self.plan.depths
        ]
        return np.array(rows, dtype=np.float64)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        save(path, self)


def load(path: Path) -> Retrieval:
    """Read what `Retrieval.save` wrote.

    Raises:
        UserError: with the command to run, if there is no such file, or it is damaged or of another
            version.
    """
    remedy = f"run `dape eval retrieval --tasks {path.stem}` on it"
    return restore(path, "retrieval", FORMAT, remedy, _retrieval)


def _retrieval(content: dict[str, Any]) -> Retrieval:
    plan = content["plan"]
    changed = {
        "plan": Plan(tuple(plan["lengths"]), tuple(plan["depths"]), plan["trials"], plan["seed"]),
        "cells": [Cell(**cell) for cell in content["cells"]],
        "refused": {int(length): why for length, why in content["refused"].items()},
    }
    return Retrieval(**{**content, **changed})


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
    batch_tokens: int = 16384,
    out: str | Path | None = None,
    partial_weights: bool = False,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    command: str = "dape.evaluate.evaluate_retrieval",
    watch: Watch = SILENT,
) -> list[Retrieval]:
    """Return whether each model finds a number hidden at a depth of a long text.

    Further arguments are those of `dape.evaluate.evaluate`.

    Args:
        models: run folders, folders or hub names of causal language models, modules in memory.
        tasks: `passkey`, `needle` (`dape.evaluate.prompts`).
        lengths: tokens of a prompt.
        corpus: the prepared corpus around a needle.
        depths: fractions of the text before the number, from 0 to 1.
        trials: numbers at each length and depth, drawn by `seed`.

    Returns:
        A record for each model and task.

    Raises:
        UserError: for an unknown task, models without a tokenizer, results that cannot be written,
            and if memory runs out.
    """
    for name in tasks:
        if name not in TASKS:
            raise unknown("task", name, TASKS)
    opened = open_models(models, tokenizer, partial_weights, watch)
    asked = tuple(sorted(set(lengths or default_lengths(opened))))
    plan = Plan(asked, tuple(depths), trials, seed)
    prompts = [[_prompts(model, name, corpus, split) for name in tasks] for model in opened]
    folders = results_folders(opened, out, lambda each: each.retrieval(tasks[0]))
    chosen = choose_device(device)
    origin = provenance(chosen) | {"command": command, "seed": seed}
    watch.begin(plan.tokens * len(tasks) * len(opened))
    found = []
    for model, each, folder in zip(opened, prompts, folders, strict=True):
        with model.loaded(chosen, max(asked)) as network:
            for task, (made, data) in zip(tasks, each, strict=True):
                name = f"{model.folder}  {task}"
                with model.refusing():
                    cells, refused = retrieve(
                        network,
                        made,
                        plan,
                        device=device_of(network, chosen),
                        batch_tokens=batch_tokens,
                        advance=watch.advance,
                        announce=partial(watch.announce, name),
                    )
                subject = model.subject(network)
                record = Retrieval(subject, task, data, plan, cells, refused, origin)
                if folder is not None:
                    record.save(folder.retrieval(task))
                found.append(record)
    return found


def _prompts(
    model: Model, task: str, corpus: str | Path | Corpus | None, split: str
) -> tuple[Prompts, str | None]:
    """Return the prompts of a task for a model, and the checksum of the corpus around a needle."""
    if task == "needle":
        text = model.corpus(corpus)
        return needle(text.tokenizer(), text, split), text.checksum
    tokenizer = model.tokenizer()
    if tokenizer is None:
        raise UserError(f"{model.source} has no tokenizer.json, in which to write a passkey")
    return passkey(tokenizer), None


def retrieve(
    model: Callable[..., Any],
    prompts: Prompts,
    plan: Plan,
    *,
    device: torch.device | str = "cpu",
    batch_tokens: int,
    advance: Callable[[int], object] = lambda tokens: None,
    announce: Callable[[int, str], object] = lambda length, outcome: None,
) -> tuple[list[Cell], dict[int, str]]:
    """Return the cells, and the lengths that the model or the prompt refuses, with the reason.

    `model` has the interface of a Hugging Face causal language model. `advance` gets the number of
    tokens of each forward, `announce` each length and its outcome.
    """
    cells: list[Cell] = []
    refused: dict[int, str] = {}
    for length in plan.lengths:
        rows = max(1, batch_tokens // length)
        try:
            asked = [
                prompts.make(length, depth, trial, plan.seed)
                for depth, trial in product(plan.depths, range(plan.trials))
            ]
            answers: list[Answer] = []
            for first in range(0, len(asked), rows):
                batch = asked[first : first + rows]
                with explained(length, len(batch)):
                    answers += score(model, batch, device)
                advance(length * len(batch))
        except Refused as reason:
            refused[length] = str(reason)
            announce(length, f"refused: {reason}")
            continue
        found = list(_cells(length, plan, answers))
        cells += found
        announce(length, f"exact {np.mean([cell.exact for cell in found]):.0%}")
    return cells, refused


@torch.inference_mode()
def score(
    model: Callable[..., Any], prompts: Sequence[Prompt], device: torch.device | str
) -> list[Answer]:
    """Return rank and log-probability of each token of the answers to prompts of one length.

    Greedy decoding gives an answer exactly if each of its tokens has rank 1 after those before it,
    so that one forward with the answer in place tells what decoding token by token would.
    """
    tokens = torch.from_numpy(np.stack([prompt.tokens for prompt in prompts])).to(device)
    kept = max(prompt.answer for prompt in prompts)
    output = model(input_ids=tokens[:, :-1], logits_to_keep=kept, use_cache=False)
    logits = output.logits[:, -kept:].float()
    own = logits.gather(-1, tokens[:, -kept:, None])
    ranks = logits.shape[-1] - (logits < own).sum(-1)  # of ties, and of NaN, the worst
    log_probabilities = (own - logits.logsumexp(-1, keepdim=True))[..., 0]
    columns = zip(ranks.cpu().numpy(), log_probabilities.cpu().numpy(), prompts, strict=True)
    return [
        (rank[-prompt.answer :], log_probability[-prompt.answer :])
        for rank, log_probability, prompt in columns
    ]


def _cells(length: int, plan: Plan, answers: Sequence[Answer]) -> Iterator[Cell]:
    for place, depth in enumerate(plan.depths):
        trials = answers[place * plan.trials : (place + 1) * plan.trials]
        ranks = np.concatenate([rank for rank, _ in trials])
        yield Cell(
            length=length,
            depth=depth,
            exact=float(np.mean([(rank == 1).all() for rank, _ in trials])),
            accuracy=float((ranks == 1).mean()),
            rank=float(ranks.mean()),
            log_probability=float(np.mean([each.sum(dtype=np.float64) for _, each in trials])),
        )
