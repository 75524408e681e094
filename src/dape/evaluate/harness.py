"""Tasks of the Language Model Evaluation Harness (lm-eval), with requests of a stated length."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dape.data.tokenizer import fingerprint
from dape.device import choose_device
from dape.errors import UserError, check_whole, install
from dape.evaluate.lengths import chosen_lengths, trained_at
from dape.evaluate.opening import Given, open_models
from dape.evaluate.record import restore, save
from dape.evaluate.request import FORMAT, Harnessed, Request
from dape.evaluate.results import KEPT, repeats, results_folders
from dape.evaluate.subject import Model, files_checksum
from dape.evaluate.watch import SILENT, Watch
from dape.packages import has_package
from dape.provenance import provenance
from dape.runs import RunFolder

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast


def manager(tasks: Sequence[str], include_path: Path | None) -> "TaskManager":
    """Return lm-eval's task manager, with the tasks of a folder, and lm-eval's own if needed.

    Raises:
        UserError: for an absent lm-eval, an absent folder, or an unknown task.
    """
    absent = UserError(f"`dape eval harness` needs lm-eval: {install('harness')}")
    if not has_package("accelerate"):  # lm-eval comes without, unless as lm-eval[hf]
        raise absent
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise absent from None
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
        longest = max((length for length, _ in asked), default=0)
        with self.model.on_demand(self.device, longest) as network:
            for length, task in asked:
                before = [] if again else self._before(task, length)
                if before:
                    self.watch.announce(str(self.model.folder), length, f"{task} {KEPT}")
                found += before or self._measured(network(), task, length)
        return found

    def _measured(self, network: torch.nn.Module, task: str, length: int) -> list[Harnessed]:
        request = Request(
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
        if self.folder is None:
            return []
        with suppress(UserError):
            whole = load(self.folder.harness(task, length))
            parts = [load(self.folder.harness(name, length)) for name in whole.parts]
            if all(repeats(each, self.model, self.origin) for each in parts):
                return [replace(each, tokenizer=fingerprint(self.tokenizer)) for each in parts]
        return []


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
