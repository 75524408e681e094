"""Folders for the results of measurements."""

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from dape.errors import UserError
from dape.evaluate.subject import InMemory, Model
from dape.runs import RunFolder


def results_folders(
    models: Sequence[Model], out: str | Path | None, file: Callable[[RunFolder], Path]
) -> list[RunFolder | None]:
    """Return where the results of each model go; None for one in memory without `out`.

    `file` tells one of the files that are to be written into a folder.

    Raises:
        UserError: if a folder cannot be written, or two models would share one.
    """
    if out is None:
        folders = [None if isinstance(model, InMemory) else model.folder for model in models]
    else:
        folders = [RunFolder(Path(out) / model.folder.path.absolute().name) for model in models]
    kept = [folder for folder in folders if folder is not None]
    for folder in kept:
        _check_writable(file(folder).parent)
        if kept.count(folder) > 1:
            raise UserError(
                f"two of the models would have their results in {folder}: evaluate them one by one,"
                " each with an --out of its own"
            )
    return folders


def drawing(kind: str, runs: Sequence[str], out: Path | None) -> str:
    """Return what tells a user how the results of some runs are drawn."""
    folders = [str(out / Path(run).absolute().name if out else run) for run in dict.fromkeys(runs)]
    return f"draw it: dape plot {kind} {shlex.join(folders)} --out {kind}.png"


def _check_writable(folder: Path) -> None:
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"results cannot be written to {folder}; give --out FOLDER")
