"""Tasks of the Language Model Evaluation Harness (lm-eval), with requests of a stated length."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dape.device import choose_device
from dape.errors import UserError, check_whole, install
from dape.evaluate.lengths import chosen_lengths, trained_at
from dape.evaluate.opening import Given, open_models
from dape.evaluate.record import restore, save
from dape.evaluate.refusal import Refused, explained
from dape.evaluate.results import KEPT, results_folders, same_origin
from dape.evaluate.subject import Model, Subject, files_checksum
from dape.evaluate.watch import SILENT, Watch
from dape.provenance import Provenance, provenance
from dape.runs import RunFolder

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
# Warnings of lm-eval about a model passed as an object.
MEANT = ("`pretrained` model kwarg is not", "Passed an already-initialized model")


@dataclass(frozen=True, slots=True)
class Score:
    """A metric of a task with the standard error, None where lm-eval has none."""

    metric: str
    value: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Harnessed:
    """The scores of a model on a task, with requests cut to the last `max_length` tokens.

    Attributes:
        subject: the model.
        task: name of the task in lm-eval.
        max_length: tokens kept of a request.
        provenance: command, commit, versions and device.
        version: version of the task.
        samples: number of documents.
        scores: a `Score` for each metric.
        cut: number of requests cut by lm-eval, over the whole group of tasks.
        parts: results of all tasks of a group; a single result for a plain task.
        refused: the reason of a refusal, without scores.
        format: version of the file format.
    """

    subject: Subject
    task: str
    max_length: int
    provenance: Provenance
    version: str | None = None
    samples: int | None = None
    scores: list[Score] = field(default_factory=list)
    cut: int = 0
    refused: str | None = None
    parts: list[str] = field(default_factory=list)
    format: int = FORMAT

    @property
    def outcome(self) -> str:
        """Return the outcome of the task in a few words."""
        if self.refused:
            return f"{self.task} refused: {self.refused}"
        return f"{self.task} " + ", ".join(f"{s.metric} {s.value:.4g}" for s in self.scores)


class Truncations(logging.Handler):
    """Counts the warnings of lm-eval about cut requests; other warnings pass."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record of lm-eval's log."""
        message = record.getMessage()
        if "runcat" in message:
            self.count += 1
        elif logging.lastResort and not message.startswith(MEANT):
            logging.lastResort.handle(record)


def manager(tasks: Sequence[str], include_path: Path | None) -> "TaskManager":
    """Return lm-eval's task manager, with the tasks of a folder, and lm-eval's own if needed.

    Raises:
        UserError: for an absent lm-eval, an absent folder, or an unknown task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(f"`dape eval harness` needs lm-eval: {install('harness')}") from None
    if include_path is not None:
        if not include_path.is_dir():
            raise UserError(f"--include-path {include_path}: the folder does not exist")
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    known = TaskManager(include_path=include_path)
    for name in tasks:
        if name not in known.all_tasks:
            near = get_close_matches(name, known.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"lm-eval knows no task {name!r}{hint} (all: `lm-eval ls tasks`)")
    return known


def evaluate_harness(
    models: Given | Sequence[Given],
    tasks: Sequence[str],
    lengths: Sequence[int] | None = None,
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    batch_tokens: int = 16384,
    out: str | Path | None = None,
    again: bool = False,
    partial_weights: bool = False,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    command: str = "dape.evaluate.evaluate_harness",
    watch: Watch = SILENT,
) -> list[Harnessed]:
    """Return the scores of lm-eval for each model, task and part of a group of tasks.

    `dape.evaluate.evaluate` explains the further arguments.

    Args:
        models: run folders, folders or hub names of causal language models, modules in memory.
        tasks: names of tasks or groups of lm-eval.
        lengths: number of last tokens kept of a request, also beyond the length in the model's
            configuration; by default the training length.
        include_path: folder with tasks of your own.
        limit: largest number of documents of a task.

    Raises:
        UserError: for an unknown task, unavailable data, unwritable results, or too little memory.
    """
    check_whole(batch_tokens=batch_tokens)
    if limit is not None:
        check_whole(limit=limit)
    known = manager(tasks, include_path)
    opened = open_models(models, tokenizer, partial_weights, watch)
    asked = [chosen_lengths(lengths or (trained_at(model),), opened) for model in opened]
    tokenizers = [_tokenizer(model) for model in opened]
    chosen = choose_device(device)
    origin = provenance(chosen) | {"command": command, "limit": limit, "tasks": _own(include_path)}
    origin["versions"]["lm-eval"] = version("lm-eval")
    names = list(dict.fromkeys(tasks))
    # A lock covers all lengths of a task.
    with results_folders(
        opened, out, lambda each: [each.harness(name, 0) for name in names]
    ) as folders:
        return [
            result
            for model, own, words, folder in zip(opened, asked, tokenizers, folders, strict=True)
            for result in _Session(
                model, words, known, folder, chosen, batch_tokens, limit, origin, watch
            ).run(list(product(own, names)), again)
        ]


def _own(folder: Path | None) -> str | None:
    """Return a checksum of the tasks and data in a folder."""
    return None if folder is None else files_checksum(folder, ("**/*",))


@dataclass(frozen=True, slots=True)
class _Session:
    """Tasks for a model; results are kept in `folder`, if given."""

    model: Model
    tokenizer: "PreTrainedTokenizerFast"
    known: "TaskManager"
    folder: RunFolder | None
    device: torch.device
    batch_tokens: int
    limit: int | None
    origin: dict[str, Any]
    watch: Watch

    def run(self, asked: Sequence[tuple[int, str]], again: bool) -> list[Harnessed]:
        """Return the results of tasks at lengths, with earlier results unless `again`."""
        found = []
        with ExitStack() as stack:

            @cache
            def network() -> torch.nn.Module:
                longest = max(length for length, _ in asked)
                return stack.enter_context(self.model.loaded(self.device, longest))

            for length, task in asked:
                before = [] if again else self._before(task, length)
                if before:
                    self.watch.announce(str(self.model.folder), length, f"{task} {KEPT}")
                found += before or self._measured(network(), task, length)
        return found

    def _measured(self, network: torch.nn.Module, task: str, length: int) -> list[Harnessed]:
        request = _Request(
            self.model, network, self.tokenizer, self.known, length, self.batch_tokens, self.limit
        )
        results = request.ask(task, self.origin)
        # The whole of a group is written after its parts, and implies that the parts exist.
        for result in sorted(results, key=lambda result: result.task == task):
            if self.folder is not None:
                save(self.folder.harness(result.task, length), result)
            self.watch.announce(str(self.model.folder), length, result.outcome)
        return results

    def _before(self, task: str, length: int) -> list[Harnessed]:
        """Return an earlier result of the same model and task, with the same settings."""
        if self.folder is None or self.model.weights is None:
            return []
        with suppress(UserError):
            whole = load(self.folder.harness(task, length))
            parts = [load(self.folder.harness(name, length)) for name in whole.parts]
            if all(self._same(each) for each in parts):
                return parts
        return []

    def _same(self, before: Harnessed) -> bool:
        return (
            before.subject.weights == self.model.weights
            and before.subject.run == str(self.model.folder)
            and before.provenance["versions"] == self.origin["versions"]
            and same_origin(before.provenance, self.origin)
        )


def load(path: Path) -> Harnessed:
    """Read the results of a task.

    Raises:
        UserError: for a file that is missing, damaged or of another version.
    """
    return restore(path, "result", FORMAT, "run `dape eval harness` on the model", Harnessed)


def _tokenizer(model: Model) -> "PreTrainedTokenizerFast":
    tokenizer = model.tokenizer()
    if tokenizer is None:
        raise UserError(f"{model.source} has no tokenizer.json; lm-eval needs a tokenizer")
    return tokenizer


@dataclass(frozen=True, slots=True)
class _Request:
    """A model at a length, ready for tasks."""

    model: Model
    network: torch.nn.Module
    tokenizer: "PreTrainedTokenizerFast"
    known: "TaskManager"
    length: int
    batch_tokens: int
    limit: int | None

    def ask(self, task: str, origin: dict[str, Any]) -> list[Harnessed]:
        """Return the results of a task, or of a group and all its parts."""
        harnessed = partial(
            Harnessed,
            subject=self.model.subject(self.network),
            max_length=self.length,
            provenance=origin,
        )
        try:
            with truncations() as log:
                outcome = self._evaluate(task)
        except (Refused, AssertionError) as error:  # lm-eval asserts that answers fit
            reason = str(error) or f"an answer alone is longer than {self.length} tokens"
            return [harnessed(task=task, refused=reason, parts=[task])]
        except OSError as error:
            raise UserError(
                f"the data of {task} are not available: {error}; run the task once with a network,"
                " or take another of --tasks"
            ) from None
        return [
            harnessed(
                task=name,
                version=str(outcome["versions"].get(name)),
                samples=outcome["n-samples"].get(name, {}).get("effective"),
                scores=scores(entry),
                cut=log.count,
                parts=list(outcome["results"]),
            )
            for name, entry in outcome["results"].items()
        ]

    def _evaluate(self, task: str) -> dict[str, Any]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        rows = max(1, self.batch_tokens // self.length)
        with explained(self.length, rows), self.model.refusing():
            return lm_eval.simple_evaluate(
                HFLM(
                    pretrained=self.network,
                    tokenizer=self.tokenizer,
                    max_length=self.length,
                    backend="causal",
                    batch_size=rows,
                ),
                tasks=[task],
                task_manager=self.known,
                limit=self.limit,
                log_samples=False,
            )


def scores(entry: Mapping[str, Any]) -> list[Score]:
    """Return the metrics of a task, from lm-eval's keys `acc,none` and `acc_stderr,none`."""
    found = []
    for key, value in entry.items():
        metric, _, form = key.partition(",")
        if form and not metric.endswith("_stderr"):
            error = entry.get(f"{metric}_stderr,{form}")
            error = float(error) if isinstance(error, float) else None
            found.append(Score(metric if form == "none" else key, float(value), error))
    return found


@contextmanager
def truncations() -> Iterator[Truncations]:
    """Count the warnings of lm-eval about cut requests."""
    log, handler = logging.getLogger("lm_eval"), Truncations(logging.WARNING)
    propagated, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield handler
    finally:
        log.removeHandler(handler)
        log.propagate = propagated
