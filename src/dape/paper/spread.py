"""Cells on devices: each runs its commands on a device of its own, the others go on if it fails."""

import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO

from dape.paper import record
from dape.paper.cells import Cell, Step
from dape.paper.record import command

# Ends of a training or a measurement that tell of the model: the cell is a result.
TELLING = re.compile(r"out of memory|step \d+: loss (nan|inf|-inf|[\d.]+), gradient norm")
ERROR = "dape: error: "


@dataclass(frozen=True, slots=True)
class End:
    """How a cell ended here: `error` is None if all its commands did what they should."""

    cell: Cell
    device: str
    seconds: float
    error: str | None


@dataclass(slots=True)
class Workers:
    """The processes that run now, so that an interruption can end them.

    `program` is what runs a command: its words are put after it.
    """

    program: Sequence[str] = (sys.executable, "-m", "dape")
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    lock: Lock = field(default_factory=Lock)
    stopped: bool = False

    def call(self, words: Sequence[str], device: str, log: IO[bytes], held: int) -> int:
        """Run a command to its end on a device, and return its status."""
        visible = {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": device}
        with self.lock:
            if self.stopped:
                return -1
            process = subprocess.Popen(
                [*self.program, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | visible,
                pass_fds=(held,),
            )
            self.running.add(process)
        try:
            return process.wait()
        finally:
            self.running.discard(process)

    def stop(self) -> None:
        """End what runs, and start nothing more."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()


def devices() -> list[str]:
    """Return the GPUs there are, as CUDA_VISIBLE_DEVICES names them, or else `cpu`."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:count]
    return (named if len(named) == count else [str(n) for n in range(count)]) or ["cpu"]


def spread(
    cells: Sequence[Cell],
    devices: Sequence[str],
    workers: Workers,
    say: Callable[[str], None],
    minutes: float | None = None,
    weights: bool = True,
) -> list[End]:
    """Run the cells in their order, one at a time on each device, and return how each ended.

    After `minutes` no further cell starts. Without `weights` those of a finished cell are deleted.
    An interruption ends the processes; what they had saved is there for the next time.
    """
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    waiting, free = list(cells), list(devices)
    running: set[Future[End]] = set()
    ends: list[End] = []
    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            while running or (waiting and time.monotonic() < deadline):
                while free and waiting and time.monotonic() < deadline:
                    cell, device = waiting.pop(0), free.pop(0)
                    say(f"{cell.name} starts on {device}")
                    running.add(pool.submit(_run, cell, device, workers, weights))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for end in (each.result() for each in done):
                    free.append(end.device)
                    ends.append(end)
                    say(outcome(end))
        except BaseException:
            workers.stop()
            raise
    return ends


def outcome(end: End) -> str:
    """Return in a line how a cell ended."""
    how = f"failed: {end.error}" if end.error else "is finished"
    return f"{end.cell.name} {how} ({end.seconds / 60:.1f} min on {end.device})"


def _run(cell: Cell, device: str, workers: Workers, weights: bool) -> End:
    """Run the commands of a cell one after the other, and keep what they leave."""
    begun = time.monotonic()
    with _alone(cell.run) as held:
        if held is None:
            error: str | None = f"another process trains {cell.run}"
        else:
            error = _steps(cell, device, workers, held)
            if not weights and _tells(error):
                record.discard(cell)
    return End(cell, device, time.monotonic() - begun, error)


def _steps(cell: Cell, device: str, workers: Workers, held: int) -> str | None:
    record.prepare(cell)
    seconds: dict[str, float] = {}
    error = None
    for step in cell.steps:
        before = time.monotonic()
        error = _step(cell, step, device, workers, held)
        seconds[command(step)] = time.monotonic() - before
        if error:
            break
    if _tells(error):
        record.finish(cell, seconds, error)
    return error


def _tells(error: str | None) -> bool:
    """Return whether an end is one of the cell, and none of the machine or of the command."""
    return error is None or bool(TELLING.search(error))


def _step(cell: Cell, step: Step, device: str, workers: Workers, held: int) -> str | None:
    """Run one command, keep what it leaves, and return its error if it fails."""
    log = cell.record / record.LOG
    with log.open("ab") as output:
        status = workers.call(step.words, device, output, held)
    record.collect(cell, step)
    return _last_line(log, status) if status else None


@contextmanager
def _alone(run: Path) -> Iterator[int | None]:
    """Hold the lock of a run folder, None if another process has it.

    Commands inherit the lock: one that outlives this process still has it.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_name(run.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def _last_line(log: Path, status: int) -> str:
    """Return the error that a command ended with: its line, or the last of a traceback."""
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    last = lines[-1].removeprefix(ERROR) if lines else ""
    return f"{last} (status {status})" if last else f"status {status}"
