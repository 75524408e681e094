"""Faults that end a process of a run, with a one-line message."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from dape.errors import RankError, of_a_peer, out_of_memory
from dape.runs import RunFolder
from dape.train.sections import Hardware


@contextmanager
def explained(run: RunFolder, hardware: Hardware, rank: int, ranks: int) -> Iterator[None]:
    """Turn a fault of a process among several into a line, and end the process at a SIGTERM.

    Raises:
        RankError: if memory runs out, or a second process has ended.
    """
    name = f"rank {rank} of {ranks}: " if ranks > 1 else ""
    with ended_by_sigterm(name, partial(_resumption, run)) if ranks > 1 else nullcontext():
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                size = hardware.micro_batch_size or "the whole batch"
                raise RankError(
                    f"{name}out of memory: lower hardware.micro_batch_size (now {size}), take"
                    " hardware.activation_checkpointing=blocks, or shard with"
                    " hardware.strategy=fsdp"
                ) from None
            if ranks == 1 or not of_a_peer(error):
                raise
            raise RankError(f"{name}a process of the run has ended; {_resumption(run)}") from None


@contextmanager
def ended_by_sigterm(name: str, remedy: Callable[[], str]) -> Iterator[None]:
    """End the process with a line at a SIGTERM, also while the process waits for another process.

    `torchrun` sends a SIGTERM after the end of any process. Python's handlers run between two lines
    of Python, and a process waiting for an exchange reaches no line. Therefore a thread handles the
    signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    inside, outside = socket.socketpair()
    outside.setblocking(False)

    def watch() -> None:
        while number := inside.recv(1):  # empty once the writing end is closed
            if number == bytes([signal.SIGTERM]):
                message = f"{name}stopped by SIGTERM, as after the end of another process"
                print(f"dape: error: {message}; {remedy()}", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)

    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    descriptor = signal.set_wakeup_fd(outside.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, handler)
        outside.close()
        watcher.join()
        inside.close()


def wait_for(path: Path, seconds: float = 60.0) -> None:
    """Wait until this process sees a file or folder that the first process sees.

    Raises:
        RankError: if the path stays invisible, as in a folder that the machines do not share.
    """
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise RankError(
                f"the first process sees {path}, and this process does not after"
                f" {seconds:.0f} s; give an --out in a folder that all machines share"
            )
        time.sleep(0.05)


def _resumption(run: RunFolder) -> str:
    saved = run.latest_checkpoint
    start = f"on from {saved.name}" if saved else "from its first step"
    return f"the same command trains {run} {start}, on any number of devices"
