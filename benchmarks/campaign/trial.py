"""A trial: one command in a process of its own, that ends by itself, by a kill or never.

The process is forked from one that has all imports behind it, so that a trial costs what the
command computes. A file event is anything that Python reports to its audit hooks and that changes
a file: opening it for writing, renaming, removing, a new folder.
"""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dape.cli import main
from dape.errors import UserError

SECONDS = 120.0  # after which a trial hangs
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_NOBODY = 65534

Action = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended, what it printed, and how many file events it had."""

    kind: str
    text: str
    events: int = 0

    @property
    def last(self) -> str:
        """Return the last line that was printed."""
        return (self.text.strip().splitlines() or [""])[-1]


class Trial:
    """An action that runs in a folder; at file event number `at` it gets the signal `stroke`."""

    def __init__(
        self,
        action: Action,
        folder: Path,
        at: int | None = None,
        stroke: signal.Signals = signal.SIGKILL,
        uid: int | None = None,
        counts: bool = True,
    ) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self._count = tempfile.NamedTemporaryFile("w+", suffix=".count")  # noqa: SIM115
        if uid is not None:
            os.chown(self._log.name, uid, uid)
        self._process = os.fork()
        if self._process == 0:
            self._child(action, folder, at, stroke, uid, counts)

    def _child(
        self,
        action: Action,
        folder: Path,
        at: int | None,
        stroke: signal.Signals,
        uid: int | None,
        counts: bool,
    ) -> None:
        code = 1
        try:
            os.setsid()
            for stream in (1, 2):
                os.dup2(self._log.fileno(), stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = (
                os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2)
            )
            os.chdir(folder)
            if uid is not None:
                os.setgid(uid)
                os.setuid(uid)
            if counts:
                sys.addaudithook(self._hook(folder, at, stroke))
            code = _exit_code(action)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _hook(
        self, folder: Path, at: int | None, stroke: signal.Signals
    ) -> Callable[[str, tuple[Any, ...]], None]:
        root, count = str(folder.resolve()), self._count.fileno()
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if not _changes(event, arguments, root):
                return
            seen += 1
            os.pwrite(count, str(seen).encode(), 0)
            if seen == at:
                os.kill(os.getpid(), stroke)

        return hook

    def stopped(self) -> bool:
        """Wait for the process to stop at its event; return whether it did."""
        return self._wait(SECONDS, os.WUNTRACED) == "stopped"

    def go_on(self) -> None:
        """Let a stopped process go on."""
        os.kill(self._process, signal.SIGCONT)

    def outcome(self, seconds: float = SECONDS) -> Outcome:
        """Wait for the end, and return it."""
        kind = self._wait(seconds, 0)
        self._log.seek(0)
        self._count.seek(0)
        text, events = self._log.read(), int(self._count.read() or 0)
        if kind == "refused" and not _is_line(text):
            kind = "several lines"
        if "Traceback (most recent call last)" in text:
            kind = "traceback"
        return Outcome(kind, text, events)

    def _wait(self, seconds: float, options: int) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found, status = os.waitpid(self._process, options | os.WNOHANG)
            if found:
                return _kind(status)
            time.sleep(0.005)
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        return "hang"


def run(action: Action, folder: Path, seconds: float = SECONDS, **options: Any) -> Outcome:
    """Return how an action in a folder ends."""
    return Trial(action, folder, **options).outcome(seconds)


def dape(*words: object) -> Action:
    """Return a command as an action."""
    return lambda: main([str(word) for word in words])


def _exit_code(action: Action) -> int:
    try:
        code = action()
        return code if isinstance(code, int) and not isinstance(code, bool) else 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except UserError as error:  # of a function, as the command line would show it
        sys.stderr.write(f"dape: error: {error}\n")
        return 2
    except BaseException:
        traceback.print_exc()
        return 1


def _is_line(text: str) -> bool:
    """Return whether an output ends with one line of error and has no other of that kind."""
    lines = text.strip().splitlines()
    errors = [line for line in lines if line.startswith("dape: error: ")]
    return len(errors) == 1 and lines[-1] == errors[0] and errors[0].isprintable()


def _changes(event: str, arguments: tuple[Any, ...], root: str) -> bool:
    """Return whether an audit event changes a file below a folder."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & _WRITES:
            return False
    elif event in _CHANGES:
        path = arguments[0]
    else:
        return False
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    return os.path.abspath(os.fsdecode(path)).startswith(root + os.sep)


def _kind(status: int) -> str:
    if os.WIFSTOPPED(status):
        return "stopped"
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else "crash"
    return {0: "accepted", 2: "refused"}.get(os.WEXITSTATUS(status), "traceback")
