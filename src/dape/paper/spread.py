"""Cells on devices: a cell runs its commands on a device, and a failure stops no further cell."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import IO

from dape.errors import UserError
from dape.paper import record
from dape.paper.cells import Cell, Command

# Errors caused by the model, with which the cell is a result.
TELLING = re.compile(r"out of memory|step \d+: loss (nan|inf|-inf|[\d.]+), gradient norm")
ERROR = "dape: error: "


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a cell; `error` is None if all commands succeeded."""

    cell: Cell
    device: str
    seconds: float
    error: str | None


@dataclass(slots=True)
class Workers:
    """The running processes, to end at an interruption.

    Args:
        program: words of the program, before the words of a command.
    """

    program: Sequence[str] = (sys.executable, "-m", "dape")
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    lock: Lock = field(default_factory=Lock)
    stopped: bool = False

    def call(self, words: Sequence[str], device: str, log: IO[bytes]) -> int:
        """Run a command to the end on a device, and return the status."""
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
            )
            self.running.add(process)
        try:
            return process.wait()
        finally:
            self.running.discard(process)

    def stop(self) -> None:
        """End all processes, and start no more."""
        with self.lock:
            self.stopped = True
            for process in list(self.running):
                process.terminate()


def devices() -> list[str]:
    """Return the visible GPUs by their names in CUDA_VISIBLE_DEVICES, or else `cpu`."""
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
) -> list[Outcome]:
    """Run the cells in order, with a cell at a time on each device, and return their ends.

    After `minutes` no cell starts. Without `weights`, the weights of a finished cell are deleted.
    An interruption ends the processes, and a repeated call resumes from saved checkpoints. Cells of
    a second process are left out.
    """
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    before = {cell.name: record.ended(cell) for cell in cells}
    waiting, free = list(cells), list(devices)
    needed = {cell.needs for cell in cells}
    running: dict[Future[Outcome], Cell] = {}
    ends: list[Outcome] = []
    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            while True:
                while free and time.monotonic() < deadline:
                    claimed = _claim(waiting, running.values(), before)
                    if claimed is None:
                        break
                    cell, claim = claimed
                    say(f"{cell.name} starts on {free[0]}")
                    keep = weights or cell.name in needed
                    running[pool.submit(_run, cell, free.pop(0), workers, keep, claim)] = cell
                if not running:
                    return ends
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    ends.append(future.result())
                    free.append(ends[-1].device)
                    say(describe(ends[-1]))
        except BaseException:
            workers.stop()
            raise


def _claim(
    waiting: list[Cell], running: Collection[Cell], before: Mapping[str, int | None]
) -> tuple[Cell, ExitStack] | None:
    """Take the first cell that can start off the list, with the lock.

    A cell can start if the base model is trained, and no second process runs the cell. Cells ended
    by a second process leave the list too.
    """
    pending = {cell.name for cell in (*waiting, *running)}
    for cell in [each for each in waiting if each.needs not in pending]:
        claim = ExitStack()
        with suppress(UserError):
            claim.enter_context(record.claimed(cell))
            waiting.remove(cell)
            if record.ended(cell) == before[cell.name]:
                return cell, claim
            claim.close()
    return None


def describe(end: Outcome) -> str:
    """Return the end of a cell as a line."""
    how = f"failed: {end.error}" if end.error else "is finished"
    return f"{end.cell.name} {how} ({end.seconds / 60:.1f} min on {end.device})"


def _run(cell: Cell, device: str, workers: Workers, weights: bool, claim: ExitStack) -> Outcome:
    """Run a cell and release the lock; a failing disk is an error of the cell."""
    begun = time.monotonic()
    with claim:
        try:
            error = _commands(cell, device, workers)
            if not weights and _tells(error):
                record.discard(cell)
        except (OSError, UserError) as failure:
            error = str(failure)
    return Outcome(cell, device, time.monotonic() - begun, error)


def _commands(cell: Cell, device: str, workers: Workers) -> str | None:
    """Run the commands in order, keep their files, and return the first error."""
    record.prepare(cell)
    seconds: dict[str, float] = {}
    error = None
    for command in cell.commands:
        begun = time.monotonic()
        error = _command(cell, command, device, workers)
        seconds[str(command)] = time.monotonic() - begun
        if error:
            break
    if _tells(error):
        record.finish(cell, seconds, error)
    return error


def _tells(error: str | None) -> bool:
    """Return whether the model caused the error, which then is a result."""
    return error is None or bool(TELLING.search(error))


def _command(cell: Cell, command: Command, device: str, workers: Workers) -> str | None:
    """Run a command, keep the files, and return the error of a failure."""
    log = record.log(cell)
    with log.open("ab") as output:
        begin = output.tell()
        status = workers.call(command.words, device, output)
    record.collect(cell, command)
    return _error(log.read_bytes()[begin:].decode("utf-8", "replace"), status) if status else None


def _error(said: str, status: int) -> str:
    """Return the error of a command: the line of the error, or else the last line."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    end = f"status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
    return f"{errors[-1]} ({end})" if errors else " ".join([*lines[-1:], f"({end})"])
