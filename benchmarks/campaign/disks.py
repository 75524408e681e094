"""Disks that are full, or may not be written."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kills import COMMANDS
from result import Result
from stage import copied, differences, must, state
from trial import dape, run

_NOBODY = 65534
_FREE = 9  # how many amounts of free space are tried, besides none


def disks(stage: Path, room: Path, every: int) -> Iterator[Result]:
    """Yield what comes of each command on a disk that fills up, and on one that is read-only."""
    if os.geteuid() != 0:
        return
    for name, (words, target) in COMMANDS.items():
        action = dape(*words.split())
        with copied(stage, room / "whole") as whole:
            before = _size(whole)
            must(run(action, whole))
            expected, needed = state(whole / target), _size(whole) - before
        for part in range(0, _FREE + 1, every):
            yield _full(stage, room, name, before + needed * part // _FREE, expected)
        for kind in ("read-only", "another's"):
            yield _closed(stage, room, name, kind)


def _full(stage: Path, room: Path, name: str, size: int, expected: dict[str, object]) -> Result:
    """Return what comes of a command whose disk fills up, and of the same command with room."""
    words, target = COMMANDS[name]
    action = dape(*words.split())
    with _disk(stage, room / "disk", size) as folder:
        first = run(action, folder)
        subprocess.run(["mount", "-o", "remount,size=256m", folder], check=True)
        last = first if first.kind == "accepted" else run(action, folder)
        fault = ""
        if first.kind not in ("refused", "accepted"):
            fault = f"{first.kind}: {first.last}"
        elif last.kind != "accepted":
            fault = f"with room {last.kind}: {last.last}"
        elif found := differences(expected, state(folder / target)):
            fault = f"differs: {', '.join(found[:3])}"
        return Result("disks", name, f"full at {size:,} bytes", f"full: {first.kind}", fault)


def _closed(stage: Path, room: Path, name: str, kind: str) -> Result:
    """Return what comes of a command in a folder that it cannot write."""
    words, _ = COMMANDS[name]
    with _disk(stage, room / "disk", 2**28) as folder:
        if kind == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        found = run(dape(*words.split()), folder, uid=_NOBODY if kind == "another's" else None)
    fault = "" if found.kind == "refused" else f"{found.kind}: {found.last}"
    return Result("disks", name, kind, f"{kind}: {found.kind}", fault)


@contextmanager
def _disk(stage: Path, place: Path, size: int) -> Iterator[Path]:
    """Yield a copy of the stage on a disk of its own with so many bytes."""
    place.mkdir(exist_ok=True)
    size = -(-size // 4096) * 4096
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m,mode=755", "none", place], check=True)
    try:
        shutil.copytree(stage, place, symlinks=True, dirs_exist_ok=True)
        subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def _size(folder: Path) -> int:
    """Return the bytes that a folder takes on a disk of pages."""
    return sum(
        4096 * -(-each.stat().st_size // 4096) for each in folder.rglob("*") if each.is_file()
    )
