"""Commands as processes of their own, with a limit of time and a log, and their end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from dape.errors import UserError


def torchrun(processes: int, *words: Any) -> list[str]:
    """Return the command that starts a script, or `-m MODULE`, in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={processes}", *map(str, words)]


def family(process: int) -> list[int]:
    """Return the ids of a process and of all processes below it, from the top."""
    below: dict[int, list[int]] = {}
    for each in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        _, parent = _state(each)
        below.setdefault(parent, []).append(each)
    found = [process]
    for each in found:
        found += below.get(each, [])
    return found


def _state(process: int) -> tuple[str, int]:
    """Return the state of a process and its parent; `X`, dead, and 0 if it is gone."""
    try:
        state, parent = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all processes below it, and wait for their end.

    `torchrun` starts its ranks in sessions of their own, so the signal goes to each. The processes
    are stopped first, and start no further ones meanwhile.
    """
    stopped: list[int] = []
    while new := [each for each in family(process.pid) if each not in stopped]:
        _send(signal.SIGSTOP, new)
        stopped += new
    _send(signal.SIGKILL, stopped)
    process.wait()
    while any(_state(each)[0] not in "XZ" for each in stopped):
        time.sleep(0.01)


def _send(number: signal.Signals, processes: Sequence[int]) -> None:
    for each in processes:
        with suppress(ProcessLookupError):
            os.kill(each, number)


@contextmanager
def started(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[Any]]:
    """Yield the process of a command, whose output goes to a file; kill what is left of it.

    The signal of a time limit, SIGTERM, ends the block too.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield process
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            kill(process)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def run(words: Sequence[str], log: Path, seconds: float) -> str:
    """Run a command for at most some seconds, and return its output.

    Raises:
        UserError: for a command that fails or does not end in time, with a line of its output.
    """
    with started(words, log) as process:
        try:
            status = process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            raise UserError(f"not done after {seconds:.0f} s") from None
    output = log.read_text()
    if status:
        raise UserError(fault(output, status))
    return output


def fault(output: str, status: int) -> str:
    """Return the line of an output that says what went wrong, without a launcher's prefix."""
    lines = [line.partition("]: ")[2] or line for line in output.splitlines()]
    named = [line for line in lines if "rror: " in line]
    return named[0] if named else f"status {status}"
