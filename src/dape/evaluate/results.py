"""Folders for the results of measurements, and the results that are there from before."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dape.errors import UserError
from dape.evaluate.record import save
from dape.evaluate.subject import InMemory, Model
from dape.files import locked, remove
from dape.runs import RunFolder, unfinished

KEPT = "measured before; --again repeats it"  # what is said of a length that is in a file
# A measurement made otherwise, with other versions or elsewhere is not taken for one of today.
_SAME = ("commit", "versions", "device", "precision", "limit", "tasks")
Record = TypeVar("Record")


@contextmanager
def results_folders(
    models: Sequence[Model],
    out: str | Path | None,
    files: Callable[[RunFolder], Sequence[Path]],
    writes: bool = True,
) -> Iterator[list[RunFolder | None]]:
    """Yield where the results of each model go; None for one in memory without `out`.

    `files` names the files that a measurement writes into a folder, and a lock keeps other
    measurements out of them. Of several processes the first alone `writes`, and takes the lock.

    Raises:
        UserError: if a folder cannot be written, another process measures the same, or two models
            would share a folder.
    """
    if out is None:
        folders = [None if isinstance(model, InMemory) else model.folder for model in models]
    else:
        folders = [RunFolder(Path(out) / model.folder.path.absolute().name) for model in models]
    kept = [folder for folder in folders if folder is not None]
    with ExitStack() as stack:
        for folder in kept:
            if kept.count(folder) > 1:
                raise UserError(
                    f"two of the models would have their results in {folder}: evaluate them one by"
                    " one, each with an --out of its own"
                )
            for file in files(folder) if writes else ():
                _keep_out_others(stack, folder, file)
        yield folders


def _keep_out_others(stack: ExitStack, folder: RunFolder, file: Path) -> None:
    """Lock a file that is to be written, until the end of the stack."""
    busy = f"another process is measuring {folder}; wait for its end, or give --out FOLDER"
    try:
        stack.enter_context(locked(file.parent, busy, file.stem))
    except OSError:
        raise UserError(f"results cannot be written to {file.parent}; give --out FOLDER") from None


@dataclass(frozen=True, slots=True)
class Kept(Generic[Record]):
    """The file of a record, and the file of finished measurements until the record is whole.

    Without a `file` nothing is kept. Of several processes the first alone `writes`.
    """

    file: Path | None
    load: Callable[[Path], Record]
    writes: bool = True

    def read(self) -> Iterator[Record]:
        """Yield what is kept; what cannot be read is measured anew."""
        for file in (self.file, unfinished(self.file)) if self.file else ():
            with suppress(UserError):
                yield self.load(file)

    def keep(self, record: Record) -> None:
        """Write what was measured of a record so far."""
        if self.file is not None and self.writes:
            save(unfinished(self.file), record)

    def finish(self, record: Record) -> None:
        """Write a whole record."""
        if self.file is not None and self.writes:
            save(self.file, record)
            remove(unfinished(self.file))


def same_origin(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two measurements were made with the same versions, in the same place."""
    return all(then.get(name) == now.get(name) for name in _SAME)


def drawing(kind: str, runs: Sequence[str], out: Path | None) -> str:
    """Return what tells a user how the results of some runs are drawn."""
    folders = [str(out / Path(run).absolute().name if out else run) for run in dict.fromkeys(runs)]
    return f"draw it: dape plot {kind} {shlex.join(folders)} --out {kind}.png"
