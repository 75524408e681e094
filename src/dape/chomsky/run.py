"""Training and testing of missing cells, several side by side on a device."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any

import torch

from dape.chomsky import cell as cells
from dape.chomsky.benchmark import Benchmark
from dape.chomsky.cell import Cell
from dape.chomsky.encoder import build, configure
from dape.chomsky.measure import OneByOne, accuracies
from dape.chomsky.stack import Stack
from dape.chomsky.tasks import TASKS
from dape.errors import UserError
from dape.files import contents, is_free, locked, remove, remove_leftovers, whole
from dape.provenance import provenance
from dape.runs import RunFolder

POINTS = 100  # of the loss curve
CHECKPOINTS = 5  # of a training

Report = Callable[["Job", int, list[float]], None]


@dataclass(frozen=True, slots=True)
class Job:
    """The seeds of a task and scheme, with the models in a stack."""

    task: str
    scheme: str
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return task and scheme."""
        return f"{self.task} {self.scheme}"


@dataclass(slots=True)
class Course:
    """A job in training: models, number of steps, loss curves, and seconds so far."""

    job: Job
    stack: Stack
    step: int = 0
    curve: list[tuple[int, list[float]]] = field(default_factory=list)
    seconds: float = 0.0


def plan(benchmark: Benchmark) -> list[Job]:
    """Return the jobs for missing cells, the longest sequences first.

    Raises:
        UserError: for a finished cell with other settings, naming the changed settings.
    """
    jobs = []
    for task in benchmark.tasks:
        for scheme in benchmark.schemes:
            seeds = tuple(
                s for s in benchmark.seeds if not cells.finished(benchmark, task, scheme, s)
            )
            if seeds:
                jobs.append(Job(task, scheme, seeds))
    # A long job at the end would keep a device busy alone.
    return sorted(
        jobs, key=lambda job: (-TASKS[job.task].output_length(1_000), "dape" not in job.scheme)
    )


def run(
    benchmark: Benchmark,
    device: torch.device,
    report: Report,
    argv: list[str],
    together: int = 1,
) -> None:
    """Train and test missing models, `together` jobs at a time, and write their cells.

    Concurrent jobs have separate streams of the GPU. At SIGINT or SIGTERM all jobs save a
    checkpoint, and the function raises `KeyboardInterrupt`. The next call resumes from the
    checkpoints.

    Raises:
        UserError: for a folder with other content, and for a folder of another process.
    """
    folder = RunFolder(benchmark.folder)
    if not (is_free(folder.path) or _holds_benchmark(folder)):
        raise UserError(f"{folder} exists and is no benchmark; give another --out")
    with locked(folder.path, f"another process trains in {folder}; wait for its end"):
        folder.update_record(provenance(device, argv))
        _run(benchmark, device, report, argv, together)


def _holds_benchmark(folder: RunFolder) -> bool:
    """Return whether a folder is of a benchmark, or has checkpoints alone, as a copy may."""
    if folder.record.is_file():
        return not folder.exists
    return folder.checkpoints.is_dir() and contents(folder.path) == {folder.checkpoints.name}


def _run(
    benchmark: Benchmark, device: torch.device, report: Report, argv: list[str], together: int
) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    due = plan(benchmark)
    _tidy(benchmark, {(job.task, job.scheme) for job in due})
    for first in range(0, len(due), together):
        jobs = due[first : first + together]
        with _precision(benchmark.training.precision):
            courses = [_begin(job, benchmark, device) for job in jobs]
            _train(courses, benchmark, report)
        models = sum(len(job.seeds) for job in jobs)
        for course in courses:
            _test(course, models, benchmark, argv)


def _begin(job: Job, benchmark: Benchmark, device: torch.device) -> Course:
    """Return a job with new models, or with the models of the checkpoint.

    Unreadable checkpoints are ignored, and checkpoints of other seeds, settings or kinds of device.
    """
    task, training = TASKS[job.task], benchmark.training
    config = configure(benchmark.model, job.scheme, task, training.length, "reference")
    course = Course(job, Stack(task, config, training, job.seeds, device))
    state = _state(job, benchmark)
    same = (job.seeds, benchmark.settings(), device.type)
    if tuple(state.get(name) for name in ("seeds", "settings", "device")) == same:
        course.stack.restore(state["stack"])
        course.step, course.curve = state["step"], state["curve"]
        course.seconds = state["seconds"]
    return course


def _train(courses: Sequence[Course], benchmark: Benchmark, report: Report) -> None:
    """Make the remaining updates, with checkpoints in between and at the end.

    Raises:
        KeyboardInterrupt: on a signal to end, after saving.
    """
    lengths, steps = benchmark.training.lengths(), benchmark.training.steps
    every = max(1, steps // POINTS)
    begun = time.monotonic() - max(course.seconds for course in courses)
    with _signals() as received:
        for step in range(1, steps + 1):
            behind = [course for course in courses if course.step < step]
            if not behind:
                continue
            for course in behind:
                course.stack.step(lengths[step - 1])
                course.step = step
            point = step % every == 0 or step == steps
            if point:
                for course in behind:
                    report(course.job, step, _log(course))
            if received or step == steps or (point and step % (every * POINTS // CHECKPOINTS) == 0):
                for course in behind:
                    course.stack.synchronize()
                    course.seconds = time.monotonic() - begun
                    _save(course, benchmark)
            if received:
                raise KeyboardInterrupt


def _log(course: Course) -> list[float]:
    """Add a point to the loss curves, and return the point."""
    last = course.curve[-1][0] if course.curve else 0
    losses = [total / (course.step - last) for total in course.stack.read_losses()]
    course.curve.append((course.step, losses))
    return losses


def _test(course: Course, models: int, benchmark: Benchmark, argv: list[str]) -> None:
    """Test the models of a job, and write their cells; `models` were trained side by side."""
    job, stack, task = course.job, course.stack, TASKS[course.job.task]
    together = stack.tests_together(task.tokens(benchmark.evaluation.longest))
    tested = stack if together else _one_by_one(course, benchmark)
    start = time.monotonic()
    found = accuracies(tested, task, benchmark.evaluation, stack.device)
    testing = (time.monotonic() - start) / len(job.seeds)
    for index, (seed, own) in enumerate(zip(job.seeds, found, strict=True)):
        parameters = stack.model(index)
        cells.save_weights(cells.weights(benchmark.folder, job.task, job.scheme, seed), parameters)
        Cell(
            task=job.task,
            scheme=job.scheme,
            seed=seed,
            settings=benchmark.settings(),
            parameters=sum(p.numel() for p in parameters.values()),
            loss=[(step, round(losses[index], 5)) for step, losses in course.curve],
            accuracy=[round(each, 3) for each in own],
            seconds={"training": course.seconds / models, "evaluation": testing},
            models=models,
            provenance=provenance(stack.device, argv),
        ).save(benchmark.folder)
    remove(_checkpoint(job, benchmark))


def _one_by_one(course: Course, benchmark: Benchmark) -> OneByOne:
    """Return the models of a job as encoders with the fastest backend of the device."""
    job, stack, task = course.job, course.stack, TASKS[course.job.task]
    config = configure(benchmark.model, job.scheme, task, benchmark.training.length)
    encoders = []
    for index, seed in enumerate(job.seeds):
        encoder = build(config, len(task.outputs), seed).to(stack.device).eval()
        encoder.load_state_dict(stack.model(index))
        encoders.append(encoder)
    return OneByOne(encoders)


def _checkpoint(job: Job, benchmark: Benchmark) -> Path:
    return RunFolder(benchmark.folder).checkpoints / f"{job.task}-{job.scheme}.pt"


def _state(job: Job, benchmark: Benchmark) -> dict[str, Any]:
    """Return what the checkpoint of a job holds, nothing if it cannot be read."""
    with suppress(EOFError, OSError, RuntimeError, UnpicklingError):
        state = torch.load(_checkpoint(job, benchmark), map_location="cpu", weights_only=True)
        if isinstance(state, dict) and state.get("step", 0) <= benchmark.training.steps:
            return state
    return {}


def _tidy(benchmark: Benchmark, due: set[tuple[str, str]]) -> None:
    """Remove what a killed process left: checkpoints of finished cells, unfinished writes."""
    folder = benchmark.folder
    for file in (folder, *folder.glob("*/"), *folder.glob("*/*/")):
        remove_leftovers(file)
    for task, scheme in {*product(benchmark.tasks, benchmark.schemes)} - due:
        job = Job(task, scheme, benchmark.seeds)
        seeds = _state(job, benchmark).get("seeds", ())
        if all(cells.path(folder, task, scheme, seed).exists() for seed in seeds):
            remove(_checkpoint(job, benchmark))


def _save(course: Course, benchmark: Benchmark) -> None:
    state = {
        "seeds": course.job.seeds,
        "settings": benchmark.settings(),
        "device": course.stack.device.type,
        "step": course.step,
        "curve": course.curve,
        "seconds": course.seconds,
        "stack": course.stack.state(),
    }
    with whole(_checkpoint(course.job, benchmark)) as partial:
        torch.save(state, partial)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect signals to end in a list, in place of ending, in the main thread."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {each: signal.signal(each, receive) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """Multiply matrices on a GPU in float32, or in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
