"""Cells on devices: a cell runs its commands on a device, and a failure stops no further cell."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import IO

from dape.errors import UserError
from dape.paper import record
from dape.paper.cells import Cell, Command

# Errors caused by the model, with which the cell is a result.
MEMORY = re.compile(r"out of memory")
DIVERGED = re.compile(r"step \d+: loss \S+, gradient norm")
ERROR = "dape: error: "
# Seconds in which a training starts and compiles: on an H200, 24 before the first update, and 7 to
# 38 for the first ten. Seconds between looks at a training.
START, LOOK = 30.0, 1.0


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

    def sees(self, device: str) -> bool:
        """Return whether a device is there; a command on a lost GPU would take the CPU instead."""
        return device == "cpu" or device in devices()

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
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(n) for n in range(count)] or ["cpu"]


@dataclass(slots=True)
class _Running:
    """A cell on a device; `leaves_room` for the next one near the end, where cells overlap."""

    cell: Cell
    device: str
    leaves_room: bool = False


def spread(
    cells: Sequence[Cell],
    devices: Sequence[str],
    workers: Workers,
    say: Callable[[str], None],
    minutes: float | None = None,
    weights: bool = True,
    overlap: bool = False,
    prices: Mapping[str, float] | None = None,
    before: Mapping[str, int | None] | None = None,
) -> list[Outcome]:
    """Run the cells in order, with a cell at a time on each device, and return their ends.

    After `minutes` no cell starts, nor does a cell whose price, in minutes by name, is more than
    what is left. Without `weights`, the weights of a finished cell are deleted. With `overlap`, the
    next cell starts on a device 30 seconds before the training of a cell ends, because the device
    has little to do while a training starts and compiles. The measurements of the first cell run
    beside the second training. A measurement of a GPU waits for an empty one. A lack of memory
    then is no result, since the other cell may be the cause.
    An interruption ends the processes, and a repeated call resumes from saved checkpoints. Cells of
    a second process are left out, also cells that the second process ended since the ends in
    `before`, by name, were read. No cell starts on a GPU that the machine has lost, nor with the
    model of a cell that failed.
    """
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    known = record.ends(cells) if before is None else before
    there, waiting, needed = list(devices), list(cells), {cell.needs for cell in cells}
    running: dict[str, _Running] = {}
    ends: list[Outcome] = []
    # The name of a cell, with the end, or with None when the cell leaves room.
    events = SimpleQueue[tuple[str, Future[Outcome] | None]]()

    def begin(cell: Cell, device: str, claim: ExitStack) -> None:
        say(f"{cell.name} starts on {device}")
        running[cell.name] = _Running(cell, device)
        keep = weights or cell.name in needed
        leave_room = partial(events.put, (cell.name, None)) if overlap else None
        future = pool.submit(_run, cell, device, workers, keep, claim, leave_room)
        future.add_done_callback(lambda ended: events.put((cell.name, ended)))

    with ThreadPoolExecutor(2 * len(devices)) as pool:
        try:
            while True:
                for device in _free(_kept(there, workers, say), running.values()):
                    affordable = partial(_affordable, prices or {}, deadline)
                    claimed = _claim(waiting, running.values(), device, known, affordable)
                    if claimed:
                        begin(claimed[0], device, claimed[1])
                if not running:
                    return ends
                name, ended = events.get()
                if ended is None:
                    running[name].leaves_room = True
                    continue
                del running[name]
                ends.append(ended.result())
                say(describe(ends[-1]))
                if ends[-1].error:
                    for cell in [each for each in waiting if each.needs == name]:
                        waiting.remove(cell)
                        say(f"{cell.name} does not start without the model of {name}")
        except BaseException:
            workers.stop()
            raise


def _kept(devices: list[str], workers: Workers, say: Callable[[str], None]) -> list[str]:
    """Return the devices, after lost ones are taken off the list."""
    for device in [each for each in devices if not workers.sees(each)]:
        devices.remove(device)
        say(f"GPU {device} is gone; no further cell starts there")
    return devices


def _free(devices: Sequence[str], running: Collection[_Running]) -> list[str]:
    """Return devices without a cell, or with one that leaves room."""
    there = {device: [each for each in running if each.device == device] for device in devices}
    return [
        device
        for device, cells in there.items()
        if len(cells) < 2 and all(each.leaves_room for each in cells)
    ]


def _affordable(prices: Mapping[str, float], deadline: float, cell: Cell) -> bool:
    """Return whether a cell ends before the deadline, by its price if it has one."""
    return time.monotonic() + 60 * prices.get(cell.name, 0.0) < deadline


def _claim(
    waiting: list[Cell],
    running: Collection[_Running],
    device: str,
    before: Mapping[str, int | None],
    affordable: Callable[[Cell], bool],
) -> tuple[Cell, ExitStack] | None:
    """Take the first cell that can start off the list, with the lock.

    A cell can start if the base model is trained, no second process runs the cell, and the cell is
    affordable. A measurement of a GPU needs the GPU alone. Cells ended by a second process leave
    the list too.
    """
    pending = {cell.name for cell in (*waiting, *(each.cell for each in running))}
    alone = all(each.device != device for each in running)
    ready = [each for each in waiting if each.needs not in pending and (alone or not each.gpu)]
    for cell in [each for each in ready if affordable(each)]:
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


def _run(
    cell: Cell,
    device: str,
    workers: Workers,
    weights: bool,
    claim: ExitStack,
    leave_room: Callable[[], None] | None,
) -> Outcome:
    """Run a cell and release the lock; a failing disk is an error of the cell."""
    begun = time.monotonic()
    with claim:
        try:
            error = _commands(cell, device, workers, leave_room)
            if not weights and _tells(error, alone=leave_room is None):
                record.discard(cell)
        except (OSError, UserError) as failure:
            error = str(failure)
    return Outcome(cell, device, time.monotonic() - begun, error)


def _commands(
    cell: Cell, device: str, workers: Workers, leave_room: Callable[[], None] | None = None
) -> str | None:
    """Run the commands in order, keep their files, and return the first error.

    A failed measurement leaves no files, because the run folder may hold those of an earlier one,
    and a killed training none, because the record may be of a finished one.
    `leave_room` is called near the end of a training, and after a training without an error.
    """
    record.prepare(cell)
    seconds: dict[str, float] = {}
    error = None
    for command in cell.commands:
        trains = cell.training is not None and command is cell.commands[0]
        near_end = leave_room if trains else None
        begun = time.monotonic()
        with _watched(cell, near_end) if near_end else nullcontext():
            error = _command(cell, command, device, workers)
        seconds[str(command)] = time.monotonic() - begun
        if not error or (trains and _tells(error, alone=leave_room is None)):
            record.collect(cell, command)
        if error:
            break
        if near_end:
            near_end()
    if _tells(error, alone=leave_room is None):
        record.finish(cell, seconds, error)
    return error


@contextmanager
def _watched(cell: Cell, near_end: Callable[[], None]) -> Iterator[None]:
    """Call `near_end` once the training has no more than `START` seconds left."""
    begun, ended = time.time(), Event()

    def watch() -> None:
        while not ended.wait(LOOK):
            if _seconds_left(cell, begun) <= START:
                near_end()
                return

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _seconds_left(cell: Cell, begun: float) -> float:
    """Return the seconds left of a training, by its last updates, or infinity if not known."""
    metrics = cell.run.metrics
    if not (cell.training and metrics.is_file() and metrics.stat().st_mtime > begun):
        return float("inf")  # metrics from before this process are of an interrupted one
    with suppress(UserError):
        match cell.run.read_metrics()[-2:]:
            case [
                {"step": before, "seconds": earlier},
                {"step": step, "seconds": now},
            ] if step > before:
                left = cell.training.recipe.training.steps - step
                return float(left * (now - earlier) / (step - before))
    return float("inf")


def _tells(error: str | None, alone: bool) -> bool:
    """Return whether the end is a result: no error, or an error that the model caused.

    A model that is not `alone` on the device may lack memory because of another cell.
    """
    return error is None or bool(DIVERGED.search(error) or (alone and MEMORY.search(error)))


def _command(cell: Cell, command: Command, device: str, workers: Workers) -> str | None:
    """Run a command, and return the error of a failure."""
    log = record.log(cell)
    with log.open("ab") as output:
        begin = output.tell()
        status = workers.call(command.words, device, output)
    return _error(log.read_bytes()[begin:].decode("utf-8", "replace"), status) if status else None


def _error(said: str, status: int) -> str:
    """Return the error of a command: the line of the error, or else the last line."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    end = f"status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
    return f"{errors[-1]} ({end})" if errors else " ".join([*lines[-1:], f"({end})"])
