"""What is kept of a cell when its weights are gone, and whether it is finished.

The record is laid out as a run folder: recipe, run.json, metrics, evaluations. Beside them lie the
output of the commands and `cell.json`, which says how the cell ended.
"""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dape.data.shards import Corpus
from dape.errors import UserError
from dape.files import read_json, remove, write_json
from dape.paper.cells import Cell, Step
from dape.train import config

State = Literal["finished", "failed", "missing", "changed"]


@dataclass(frozen=True, slots=True)
class End:
    """How a cell ended.

    commands: the command that left each file, by its place in the record.
    seconds: of each command.
    error: why the cell ended before its last command, if the reason lies in the model: it diverged,
        or memory did not suffice. Such a cell is a result and is not run again.
    checksum, train_tokens: of the corpus.
    """

    commands: dict[str, str]
    seconds: dict[str, float]
    error: str | None
    checksum: str
    train_tokens: int

    @property
    def minutes(self) -> float:
        """Return the minutes of all commands."""
        return sum(self.seconds.values()) / 60


def log(cell: Cell) -> Path:
    """Return the file with the output of the cell's commands."""
    return cell.record.path / "log.txt"


def read(cell: Cell) -> End:
    """Return how a cell ended.

    Raises:
        UserError: if it has not.
    """
    return read_json(_file(cell), lambda content: End(**content), "run the cell again")


def state(cell: Cell, checksums: Mapping[str, str]) -> State:
    """Return whether a cell is finished.

    `checksums` holds those of the corpora that are here, by folder. A record of another recipe,
    other data or another measurement makes the cell `changed`: it is to be run again.
    """
    if not _file(cell).is_file():
        return "missing"
    end = read(cell)
    if checksums.get(cell.data, end.checksum) != end.checksum or _other_recipe(cell):
        return "changed"
    if end.error:
        return "failed"
    return "finished" if _measured(cell, end) else "changed"


def prepare(cell: Cell) -> None:
    """Make the folder of the record, without what another recipe left in it."""
    if _other_recipe(cell):
        remove(cell.record.path)
    cell.record.path.mkdir(parents=True, exist_ok=True)


def collect(cell: Cell, step: Step) -> None:
    """Copy what a step keeps, as far as it is there, from the run folder to the record."""
    for kept, place in step.keeps.items():
        if (cell.run.path / place).is_file():
            target = cell.record.path / kept
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cell.run.path / place, target)


def finish(cell: Cell, seconds: dict[str, float], error: str | None) -> None:
    """Write how a cell ended, beside what was measured of it before.

    A training that was interrupted took the seconds that its own record says.
    """
    corpus, train = Corpus(cell.data), command(cell.steps[0])
    seconds[train] = max(seconds[train], cell.record.read_record().get("seconds", 0.0))
    before = read(cell) if _file(cell).is_file() else None
    commands = {str(kept): command(step) for step in cell.steps for kept in step.keeps}
    end = End(
        commands=(before.commands if before else {}) | commands,
        seconds=(before.seconds if before else {}) | seconds,
        error=error,
        checksum=corpus.checksum,
        train_tokens=corpus.split("train").num_tokens,
    )
    write_json(_file(cell), asdict(end))


def discard(cell: Cell) -> None:
    """Delete the weights of a cell: its checkpoints and its model."""
    remove(cell.run.checkpoints)
    remove(cell.run.model)


def command(step: Step) -> str:
    """Return the command of a step as a reader types it."""
    return shlex.join(["dape", *step.words])


def checksums(cells: Sequence[Cell]) -> dict[str, str]:
    """Return the checksums of the cells' corpora that are here, by folder."""
    found = {}
    for folder in dict.fromkeys(cell.data for cell in cells):
        try:
            found[folder] = Corpus(folder).checksum
        except UserError:
            continue
    return found


def _file(cell: Cell) -> Path:
    return cell.record.path / "cell.json"


def _other_recipe(cell: Cell) -> bool:
    known = cell.record.recipe
    return known.is_file() and bool(config.differences(config.read(known), cell.recipe))


def _measured(cell: Cell, end: End) -> bool:
    """Return whether the record holds what the commands after the training leave."""
    return all(
        end.commands.get(str(kept)) == command(step) and (cell.record.path / kept).is_file()
        for step in cell.steps[1:]
        for kept in step.keeps
    )
