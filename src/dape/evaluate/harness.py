"""Tasks of the Language Model Evaluation Harness (lm-eval), whose requests have a stated length."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dape.errors import UserError
from dape.evaluate.limits import Refused, told
from dape.evaluate.record import write
from dape.evaluate.runs import Run

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
# What lm-eval warns of when a model is handed to it, which is how we mean it.
MEANT = ("`pretrained` model kwarg is not", "Passed an already-initialized model")


@dataclass(frozen=True, slots=True)
class Score:
    """A metric of a task with its standard error, None where lm-eval has none."""

    metric: str
    value: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Harnessed:
    """One model on one task, whose requests keep their last `max_length` tokens.

    `cut` counts how often lm-eval said, in all tasks of the command, that it cut a request to that.
    `samples` are the documents asked about, `version` is the task's own. A model that refused has
    the reason in `refused` and no scores. The other fields are those of
    `dape.evaluate.record.Evaluation`.
    """

    run: str
    scheme: str
    train_length: int | None
    seed: int | None
    settings: str | None
    parameters: int
    task: str
    max_length: int
    provenance: dict[str, Any]
    version: str | None = None
    samples: int | None = None
    scores: list[Score] = field(default_factory=list)
    cut: int = 0
    refused: str | None = None
    format: int = FORMAT

    def save(self) -> None:
        """Write `RUN/harness/TASK-LENGTH.json`, whole or not at all."""
        write(Path(self.run) / "harness" / f"{self.task}-{self.max_length}.json", self)


class Truncations(logging.Handler):
    """Counts what lm-eval says of requests that it cuts; other warnings go where they would."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record of lm-eval's log."""
        message = record.getMessage()
        if "runcat" in message:
            self.count += 1
        elif logging.lastResort and not message.startswith(MEANT):
            logging.lastResort.handle(record)


def manager(tasks: Sequence[str], include_path: Path | None) -> "TaskManager":
    """Return what knows the tasks: those of a folder, and lm-eval's own if they do not suffice.

    Raises `UserError` if lm-eval is not installed, the folder is not there, or for an unknown task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--harness needs lm-eval: pip install 'dape[harness]'") from None
    if include_path is not None:
        if not include_path.is_dir():
            raise UserError(f"--include-path {include_path}: no such folder")
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


def harness(
    run: Run,
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerFast",
    tasks: Sequence[str],
    known: "TaskManager",
    *,
    max_length: int,
    batch_tokens: int,
    limit: int | None,
    provenance: dict[str, Any],
) -> list[Harnessed]:
    """Return what lm-eval measures of a run's model, for each task and each part of a group.

    A request keeps its last `max_length` tokens, whatever the model's configuration says. Raises
    `UserError` if the data of a task cannot be had, or memory runs out.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    facts = run.facts(model) | {"max_length": max_length, "provenance": provenance}
    rows = max(1, batch_tokens // max_length)
    try:
        with truncations() as log, told(max_length, rows), run.limits():
            outcome = lm_eval.simple_evaluate(
                HFLM(
                    pretrained=model,
                    tokenizer=tokenizer,
                    max_length=max_length,
                    backend="causal",
                    batch_size=rows,
                ),
                tasks=list(tasks),
                task_manager=known,
                limit=limit,
                log_samples=False,
            )
    except (Refused, AssertionError) as error:  # lm-eval asserts that answers fit
        reason = str(error) or f"an answer alone is longer than {max_length} tokens"
        return [Harnessed(**facts, task=name, refused=reason) for name in tasks]
    except OSError as error:
        raise UserError(f"the data of {', '.join(tasks)} cannot be had: {error}") from None
    return [
        Harnessed(
            **facts,
            task=name,
            version=str(outcome["versions"].get(name)),
            samples=outcome["n-samples"].get(name, {}).get("effective"),
            scores=scores(entry),
            cut=log.count,
        )
        for name, entry in outcome["results"].items()
    ]


def scores(entry: Mapping[str, Any]) -> list[Score]:
    """Return the metrics in lm-eval's results of a task, `acc,none` and its `acc_stderr,none`."""
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
    """Count what lm-eval says of requests that it cuts."""
    log, handler = logging.getLogger("lm_eval"), Truncations(logging.WARNING)
    propagated, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield handler
    finally:
        log.removeHandler(handler)
        log.propagate = propagated
