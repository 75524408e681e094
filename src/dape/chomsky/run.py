"""Training and testing of the cells that are missing, on every GPU there is."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from multiprocessing import get_context
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dape.chomsky import cell as cells
from dape.chomsky.benchmark import Benchmark
from dape.chomsky.cell import Cell
from dape.chomsky.encoder import build, configure
from dape.chomsky.measure import accuracies
from dape.chomsky.stack import Stack
from dape.chomsky.tasks import TASKS
from dape.files import remove, whole
from dape.provenance import provenance

POINTS = 100  # of the loss curve
CHECKPOINTS = 5  # of a training

Report = Callable[["Job", int, list[float]], None]


@dataclass(frozen=True, slots=True)
class Job:
    """The seeds of one task and scheme, which train side by side."""

    task: str
    scheme: str
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return task and scheme."""
        return f"{self.task} {self.scheme}"


def plan(benchmark: Benchmark) -> list[Job]:
    """Return the jobs for the cells that are missing, those with the longest sequences first.

    Raises:
        UserError: for a finished cell of other settings, naming them.
    """
    jobs = []
    for task in benchmark.tasks:
        for scheme in benchmark.schemes:
            seeds = tuple(
                s for s in benchmark.seeds if not cells.finished(benchmark, task, scheme, s)
            )
            if seeds:
                jobs.append(Job(task, scheme, seeds))
    # A long job that starts last would keep one device busy alone.
    return sorted(
        jobs, key=lambda job: (-TASKS[job.task].output_length(1_000), "dape" not in job.scheme)
    )


def run(
    job: Job, benchmark: Benchmark, device: torch.device, report: Report, argv: list[str]
) -> None:
    """Train and test the models of a job and write their cells; an interrupted one goes on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    task, training = TASKS[job.task], benchmark.training
    with _precision(training.precision):
        config = configure(benchmark.model, job.scheme, task, training.length, "reference")
        stack = Stack(task, config, training, job.seeds, device)
        progress = _train(stack, job, benchmark, report)
    encoders = []
    config = configure(benchmark.model, job.scheme, task, training.length)
    for index, seed in enumerate(job.seeds):
        encoder = build(config, len(task.outputs), seed).to(device).eval()
        encoder.load_state_dict(stack.model(index))
        encoders.append(encoder)
    start = time.monotonic()
    found = accuracies(encoders, task, benchmark.evaluation, device)
    seconds = {"training": progress.seconds, "evaluation": time.monotonic() - start}
    for index, (seed, own) in enumerate(zip(job.seeds, found, strict=True)):
        parameters = stack.model(index)
        cells.save_weights(cells.weights(benchmark.folder, job.task, job.scheme, seed), parameters)
        Cell(
            task=job.task,
            scheme=job.scheme,
            seed=seed,
            settings=benchmark.settings(),
            parameters=sum(p.numel() for p in parameters.values()),
            loss=[(step, losses[index]) for step, losses in progress.curve],
            accuracy=own,
            seconds=seconds,
            models=len(job.seeds),
            provenance=provenance(device, argv),
        ).save(benchmark.folder)
    remove(_checkpoint(job, benchmark))


@dataclass(slots=True)
class Progress:
    """How far a training is: steps, the loss curve of every model, and seconds so far."""

    step: int
    curve: list[tuple[int, list[float]]]
    seconds: float


def _train(stack: Stack, job: Job, benchmark: Benchmark, report: Report) -> Progress:
    """Make the updates that are left, with a checkpoint now and then."""
    lengths, steps = benchmark.training.lengths(), benchmark.training.steps
    progress = _resume(stack, job, benchmark)
    start = time.monotonic() - progress.seconds
    for step in range(progress.step + 1, steps + 1):
        stack.step(lengths[step - 1])
        if step % max(1, steps // POINTS) and step < steps:
            continue
        last = progress.curve[-1][0] if progress.curve else 0
        losses = [total / (step - last) for total in stack.read_losses()]
        progress.curve.append((step, losses))
        progress.step, progress.seconds = step, time.monotonic() - start
        report(job, step, losses)
        if len(progress.curve) % (POINTS // CHECKPOINTS) == 0 and step < steps:
            _save(stack, progress, job, benchmark)
    return progress


def _checkpoint(job: Job, benchmark: Benchmark) -> Path:
    return benchmark.folder / "checkpoints" / f"{job.task}-{job.scheme}.pt"


def _save(stack: Stack, progress: Progress, job: Job, benchmark: Benchmark) -> None:
    state = {
        "seeds": job.seeds,
        "settings": benchmark.settings(),
        "device": stack.device.type,
        "step": progress.step,
        "curve": progress.curve,
        "seconds": progress.seconds,
        "stack": stack.state(),
    }
    with whole(_checkpoint(job, benchmark)) as partial:
        torch.save(state, partial)


def _resume(stack: Stack, job: Job, benchmark: Benchmark) -> Progress:
    """Return where to go on: at the checkpoint of the same seeds, settings and kind of device.

    One that cannot be read is none.
    """
    state: dict[str, Any] = {}
    with suppress(EOFError, OSError, RuntimeError, UnpicklingError):
        file = _checkpoint(job, benchmark)
        state = torch.load(file, map_location="cpu", weights_only=True)
    same = (job.seeds, benchmark.settings(), stack.device.type)
    if tuple(state.get(name) for name in ("seeds", "settings", "device")) == same:
        stack.restore(state["stack"])
        return Progress(state["step"], state["curve"], state["seconds"])
    return Progress(0, [], 0.0)


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """Multiply matrices on a GPU in float32, or in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: `error` is None if its cells are written."""

    job: Job
    error: str | None


def run_all(
    benchmark: Benchmark,
    devices: Sequence[torch.device],
    report: Report,
    argv: list[str],
    minutes: float = math.inf,
) -> Iterator[Outcome]:
    """Run the jobs that are missing, one at a time on each device, and yield how each ended.

    Several devices have a process each; `report` hears of the losses on one device only. After
    `minutes` no further job starts.
    """
    deadline = time.monotonic() + 60 * minutes
    jobs = takewhile(lambda _: time.monotonic() < deadline, plan(benchmark))
    if len(devices) == 1:
        for job in jobs:
            yield _outcome(job, partial(run, job, benchmark, devices[0], report, argv))
        return
    with ExitStack() as stack:
        context = get_context("spawn")
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in devices]
        free, running = list(range(len(devices))), {}
        while True:
            for job in islice(jobs, len(free)):
                place = free.pop()
                future = pools[place].submit(run, job, benchmark, devices[place], _silent, argv)
                running[future] = place, job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                place, job = running.pop(future)
                free.append(place)
                yield _outcome(job, future.result)


def _outcome(job: Job, finish: Callable[[], None]) -> Outcome:
    """Return how a job ends; an error of one leaves the others to run."""
    try:
        finish()
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        return Outcome(job, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    return Outcome(job, None)


def _silent(job: Job, step: int, losses: list[float]) -> None:
    """Report nothing."""
