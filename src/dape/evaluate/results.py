"""Folders for the results of measurements, and earlier results in the folders."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from os.path import abspath
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from dape.errors import UserError
from dape.evaluate.record import Recorded, save
from dape.evaluate.subject import InMemory, Model
from dape.evaluate.watch import Watch
from dape.files import locked, remove
from dape.provenance import provenance
from dape.runs import RunFolder, unfinished

KEPT = "measured before; --again measures again"  # the outcome shown for a kept length
# Keys of the provenance in which an earlier measurement must agree to be used again.
_SAME = ("commit", "versions", "device", "precision", "limit", "tasks")
Record = TypeVar("Record", bound=Recorded)


@contextmanager
def results_folders(
    models: Sequence[Model],
    out: str | Path | None,
    files: Callable[[RunFolder], Sequence[Path]],
    writes: bool = True,
) -> Iterator[list[RunFolder | None]]:
    """Yield the result folder of each model; None for a module in memory without `out`.

    `files` names the files of a measurement in a folder, locked against other measurements. Only
    the first of several processes `writes`, and takes the lock.

    Raises:
        UserError: for an unwritable folder, a folder in use by another measurement, or two models
            with the same folder.
    """
    if out is None:
        folders = [None if isinstance(model, InMemory) else model.folder for model in models]
    else:
        folders = [RunFolder(_inside(out, model.folder)) for model in models]
    kept = [folder for folder in folders if folder is not None]
    with ExitStack() as stack:
        for folder in kept:
            if kept.count(folder) > 1:
                raise UserError(
                    f"two of the models would have their results in {folder}; evaluate the models"
                    " separately, with different --out"
                )
            for file in files(folder) if writes else ():
                _keep_out_others(stack, folder, file)
        yield folders


def _inside(out: str | Path, run: str | RunFolder) -> Path:
    """Return the folder in `out` for the results of a run, `out/demo` for `runs/demo`."""
    return Path(out) / Path(abspath(run)).name


def _keep_out_others(stack: ExitStack, folder: RunFolder, file: Path) -> None:
    """Lock a file before writing, until the end of the stack."""
    busy = f"another process is measuring {folder}; wait for the end, or give --out FOLDER"
    try:
        stack.enter_context(locked(file.parent, busy, file.stem))
    except OSError:
        raise UserError(f"results cannot be written to {file.parent}; give --out FOLDER") from None


@dataclass(frozen=True, slots=True)
class Kept(Generic[Record]):
    """The file of a record, and the file of finished measurements until the record is whole.

    Without a `file` nothing is kept. Only the first of several processes `writes`.
    """

    file: Path | None
    load: Callable[[Path], Record]
    writes: bool = True

    def before(
        self, model: Model, origin: Mapping[str, Any], alike: Callable[[Record], bool]
    ) -> list[Record]:
        """Return the readable measurements that repeat a measurement, and are `alike`."""
        found = []
        for file in (self.file, unfinished(self.file)) if self.file else ():
            with suppress(UserError):
                found.append(self.load(file))
        return [each for each in found if repeats(each, model, origin) and alike(each)]

    def note_lost(
        self,
        model: Model,
        watch: Watch,
        origin: Mapping[str, Any],
        whole: Callable[[Record], bool],
    ) -> None:
        """Note a finished record that the next replaces without being `whole` in the next."""
        if self.file is None or not self.writes:
            return
        with suppress(UserError):
            before = self.load(self.file)
            if abspath(before.subject.run) != abspath(model.folder):
                found = f"is of {before.subject.run}"
            elif before.provenance.get("precision") != origin["precision"] or not whole(before):
                found = "has other tokens, lengths or precision"
            else:
                return
            watch.note(
                f"{self.file} {found}, and is replaced at the end of this measurement; --out FOLDER"
                " keeps the file"
            )

    def keep(self, record: Record) -> None:
        """Write the measurements of an unfinished record."""
        if self.file is not None and self.writes:
            save(unfinished(self.file), record)

    def finish(self, record: Record) -> None:
        """Write a whole record."""
        if self.file is not None and self.writes:
            save(self.file, record)
            remove(unfinished(self.file))


def origins(
    models: Sequence[Model], device: torch.device, precision: str, **settings: Any
) -> list[dict[str, Any]]:
    """Return the provenance of the results of each model, with its precision and `settings`.

    Raises:
        UserError: for an unknown precision.
    """
    common = provenance(device) | settings
    return [common | {"precision": each} for each in precisions(models, device, precision)]


def precisions(models: Sequence[Model], device: torch.device, asked: str = "auto") -> list[str]:
    """Return the precision of products of models that are measured together.

    `auto` is the precision of a run's training. A model of others has no training here and takes
    the precision of the runs beside it, so that the precision is no part of the comparison.

    Raises:
        UserError: for an unknown precision.
    """
    found = [model.precision(device, asked) for model in models]
    low = "bf16" in found
    return [
        "bf16" if low and model.recipe is None else own
        for model, own in zip(models, found, strict=True)
    ]


def repeats(before: Recorded, model: Model, origin: Mapping[str, Any]) -> bool:
    """Return whether an earlier record has the same model, commit, versions, device and settings.

    A module in memory has no checksum of the weights, and is measured again.
    """
    return (
        model.weights is not None
        and before.subject.weights == model.weights
        and before.subject.run == str(model.folder)
        and all(before.provenance.get(name) == origin.get(name) for name in _SAME)
    )


def drawing(kind: str, runs: Sequence[str], out: Path | None) -> str:
    """Return a hint with the command that draws the results of runs."""
    folders = [str(_inside(out, run) if out else run) for run in dict.fromkeys(runs)]
    return f"to draw the results: dape plot {kind} {shlex.join(folders)} --out {kind}.png"
