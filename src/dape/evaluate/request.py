"""A request to lm-eval: a model at a length, a task, and the scores."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dape.data.tokenizer import fingerprint
from dape.errors import UserError
from dape.evaluate.refusal import Refused, explained
from dape.evaluate.subject import Model, Subject
from dape.provenance import Provenance
from dape.strict import Number

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
    value: Number
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
        tokenizer: fingerprint of the tokenizer, None in records of earlier versions.
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
    tokenizer: str | None = None
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


@dataclass(frozen=True, slots=True)
class Request:
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
            tokenizer=fingerprint(self.tokenizer),
        )
        try:
            with truncations() as log:
                outcome = self._evaluate(task, log)
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

    def _evaluate(self, task: str, log: Truncations) -> dict[str, Any]:
        import lm_eval

        rows = max(1, self.batch_tokens // self.length)
        with explained(self.length, rows), self.model.refusing(self.network):
            return lm_eval.simple_evaluate(
                _counting(log)(
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


def _counting(log: Truncations) -> Any:
    """Return lm-eval's class of models, with a count of each prompt cut before a generation.

    lm-eval itself warns once for a batch of prompts.
    """
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):
        def tok_batch_encode(
            self,
            strings: Any,
            padding_side: Any = "left",
            left_truncate_len: Any = None,
            **how: Any,
        ) -> Any:
            tokens, mask = super().tok_batch_encode(strings, padding_side, **how)
            last = left_truncate_len or tokens.shape[1]
            log.count += int((mask.sum(1) > last).sum())
            return tokens[:, -last:], mask[:, -last:]

    return Counting


def scores(entry: Mapping[str, Any]) -> list[Score]:
    """Return the metrics of a task, from lm-eval's keys `acc,none` and `acc_stderr,none`."""
    found = []
    for key, value in entry.items():
        metric, _, form = key.partition(",")
        if form and not metric.endswith("_stderr"):
            error = entry.get(f"{metric}_stderr,{form}")
            if not (isinstance(error, float) and math.isfinite(error)):
                error = None
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
