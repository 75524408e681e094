"""Outputs of a run: `metrics.jsonl`, TensorBoard, a service on request, the screen."""

import math
import time
from dataclasses import asdict
from datetime import timedelta
from importlib import import_module
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dape.errors import UserError
from dape.files import as_json, write_text
from dape.packages import has_package
from dape.train.recipe import Settings

Metrics = dict[str, float | int]

SECONDS_BETWEEN_LINES = 10.0


def check(recipe: Settings) -> None:
    """Raise a `UserError` if the tracking service is not installed."""
    service = recipe.tracking.service
    if service != "none" and not has_package(service):
        raise UserError(
            f"tracking.service={service!r} is not installed; run `pip install {service}`, or leave"
            f" the option out: {recipe.run.metrics.name} and TensorBoard are written always"
        )


class Tracker:
    """Writes the metrics of logged steps to all outputs.

    A run that resumes at `step` continues the files at `step`. Lines of later steps are dropped
    from the metrics, and TensorBoard hides later points, because the later steps are computed
    again.
    """

    def __init__(self, recipe: Settings, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = _reopen(recipe, step)
        self._board = SummaryWriter(str(recipe.run.tensorboard), purge_step=step + 1)
        self._service: Any = None
        if recipe.tracking.service != "none":
            self._service = import_module(recipe.tracking.service)
            self._service.init(
                project="dape", name=recipe.folder.name, config=asdict(recipe), resume="allow"
            )

    def log(self, metrics: Metrics) -> None:
        """Write a line with `step` and the measurements."""
        self._file.write(as_json(metrics) + "\n")
        self._file.flush()
        values = {name: value for name, value in metrics.items() if name != "step"}
        for name, value in values.items():
            self._board.add_scalar(name, value, int(metrics["step"]))
        self._board.flush()
        if self._service is not None:
            self._service.log(values, step=int(metrics["step"]))

    def close(self) -> None:
        """Close every output."""
        self._file.close()
        self._board.close()
        if self._service is not None:
            self._service.finish()


def _reopen(recipe: Settings, step: int) -> TextIO:
    """Return the metrics of a run open for appending, without lines after `step`."""
    run = recipe.run
    kept = [each for each in run.read_metrics() if each["step"] <= step]
    newest = max((each["step"] for each in kept), default=0)
    if step - newest >= recipe.tracking.log_every:
        print(f"{run.metrics} has no metrics of steps {newest + 1} to {step}")
    write_text(run.metrics, "".join(as_json(each) + "\n" for each in kept))
    return run.metrics.open("a", encoding="utf-8")


class Reporter:
    """Reports the progress of a run: metrics for the tracker, a bar on a terminal, else lines.

    `tokens` is the number of tokens in a step, or None if steps differ. `ceiling` is the number of
    tokens a second at the peak of the devices, if known. The model FLOPs utilisation, `mfu`, is the
    reached fraction of `ceiling`.
    """

    def __init__(
        self, recipe: Settings, done: int, tokens: int | None, ceiling: float | None
    ) -> None:
        self._steps, self._tokens, self._ceiling = recipe.training.steps, tokens, ceiling
        self._tracker = Tracker(recipe, done)
        self._console = Console()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=self._steps, completed=done)
        self._first, self._start, self._said = done, time.monotonic(), -math.inf
        self._updates, self._seconds = 0, 0.0

    def __enter__(self) -> "Reporter":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        self._tracker.close()

    def only(self, metrics: Metrics) -> None:
        """Log the validation of a run without updates."""
        self._tracker.log(metrics)
        print(f"step 0/0  validation {metrics['validation_loss']:.4f}", flush=True)

    def step(self, metrics: Metrics, due: bool) -> None:
        """Count an update, and log a `due` update with the speed since the last logged update."""
        self._updates += 1
        self._seconds += metrics.pop("update_seconds")
        step = int(metrics["step"])
        if not due:
            self._bar.update(self._task, completed=step)
            return
        metrics |= self._speed()
        self._updates, self._seconds = 0, 0.0
        self._tracker.log(metrics)
        self._show(step, metrics)

    def _speed(self) -> Metrics:
        steps = self._updates / self._seconds
        if self._tokens is None:
            return {"steps_per_second": steps}
        tokens = steps * self._tokens
        return {"tokens_per_second": tokens} | (
            {"mfu": tokens / self._ceiling} if self._ceiling else {}
        )

    def _show(self, step: int, metrics: Metrics) -> None:
        now, steps = time.monotonic(), self._steps
        left = (now - self._start) / (step - self._first) * (steps - step)
        text = "  ".join([*_words(metrics), f"{timedelta(seconds=round(left))} left"])
        self._bar.update(self._task, completed=step, description=text)
        due = "validation_loss" in metrics or now - self._said >= SECONDS_BETWEEN_LINES
        if due and not self._console.is_terminal:
            self._said = now
            print(f"step {step}/{steps}  {text}", flush=True)


def _words(metrics: Metrics) -> list[str]:
    words = [f"loss {metrics['loss']:.4f}"]
    if "validation_loss" in metrics:
        words.append(f"validation {metrics['validation_loss']:.4f}")
    for unit in ("tokens", "steps"):
        if f"{unit}_per_second" in metrics:
            words.append(f"{metrics[f'{unit}_per_second']:,.0f} {unit}/s")
    if "mfu" in metrics:
        words.append(f"MFU {metrics['mfu']:.0%}")
    return words
