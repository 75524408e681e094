"""The record of a cell without weights, and whether the cell is finished.

The record has the layout of a run folder: recipe, run.json, metrics, evaluations. The output of the
commands and `cell.json`, the end of the cell, are files of the record too.
"""

import math
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from dape.data.shards import Corpus
from dape.errors import UserError
from dape.evaluate.record import load
from dape.files import locked, read_json, remove, whole, write_json, write_text
from dape.paper.cells import INSIDE, Cell, Command
from dape.strict import build
from dape.train import recipe as recipes
from dape.train.recipe import Settings

State = Literal["finished", "failed", "missing", "changed"]


@dataclass(frozen=True, slots=True)
class End:
    """The end of a cell.

    Attributes:
        commands: the commands behind the files, by path in the record.
        seconds: seconds of the commands.
        error: divergence or lack of memory, the reason of an early end. A cell with an error is a
            result and does not run again.
        checksum: checksum of the corpus; None without a training.
        train_tokens: tokens of the corpus; 0 without a training.
    """

    commands: dict[str, str]
    seconds: dict[str, float]
    error: str | None
    checksum: str | None
    train_tokens: int


def log(cell: Cell) -> Path:
    """Return the file with the output of the cell's commands."""
    return cell.record.path / "log.txt"


def read(cell: Cell) -> End:
    """Return the end of a cell.

    Raises:
        UserError: for an unfinished cell.
    """
    end = read_json(_file(cell), partial(build, End), _remedy(cell))
    if cell.training and end.train_tokens < 1:
        raise UserError(f"{_file(cell)}: train_tokens={end.train_tokens}; {_remedy(cell)}")
    return end


def metrics(cell: Cell) -> list[dict[str, Any]]:
    """Return the metrics of a finished training, with the validation loss at the end.

    Raises:
        UserError: for metrics that are damaged or end earlier.
    """
    found = cell.record.read_metrics()
    if not found or "validation_loss" not in found[-1]:
        raise UserError(f"{cell.record.metrics} lacks the end of the training")
    return found


@contextmanager
def repairable(cells: Iterable[Cell]) -> Iterator[None]:
    """Add the remedy to an error on a file of a record."""
    try:
        yield
    except UserError as error:
        for cell in cells:
            if f"{cell.record}{os.sep}" in str(error) and _remedy(cell) not in str(error):
                raise UserError(f"{error}; {_remedy(cell)}") from None
        raise


def _remedy(cell: Cell) -> str:
    return f"delete {cell.record}, and `dape paper` makes the record anew"


def minutes(cells: Iterable[Cell]) -> float:
    """Return the device minutes of the commands of ended cells.

    Commands of further experiments on the same cells do not count.
    """
    return math.fsum(_seconds(cell) for cell in cells) / 60


def _seconds(cell: Cell) -> float:
    """Return the seconds of a cell's commands, in the words of the record."""
    end = read(cell)
    kept = (str(path) for command in cell.commands for path in command.keeps)
    return math.fsum(
        end.seconds.get(words, 0.0)
        for words in dict.fromkeys(end.commands[path] for path in kept if path in end.commands)
    )


def state(cell: Cell, checksums: Mapping[str, str]) -> State:
    """Return whether a cell is finished.

    `checksums` holds the checksums of the corpora on this machine, by folder. A cell is `changed`
    if the record differs in recipe, recipe of the base model, data or measurement, and then must
    run again.
    """
    if not _file(cell).is_file():
        return "missing"
    end = read(cell)
    if _other_recipe(cell) or _other_base(cell) or _other_data(cell, end, checksums):
        return "changed"
    if end.error:
        return "changed" if _failed_otherwise(cell, end) else "failed"
    return "finished" if _measured(cell, end, checksums) else "changed"


def claimed(cell: Cell) -> AbstractContextManager[None]:
    """Return the lock on a cell, among processes with shared results.

    Raises:
        UserError: on entry, if a second process has the lock.
    """
    return locked(cell.home / ".claims" / cell.name, f"another process runs {cell.name}")


def ends(cells: Iterable[Cell]) -> dict[str, int | None]:
    """Return the times of the last ends of cells, by name."""
    return {cell.name: ended(cell) for cell in cells}


def ended(cell: Cell) -> int | None:
    """Return the time of the last end of a cell, in nanoseconds, or None."""
    try:
        return _file(cell).stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None


def prepare(cell: Cell) -> None:
    """Make the folder of the record, without files of a different recipe or corpus.

    A finished run is removed if the model was discarded, because a finished run does not train, and
    any run that began with the base model of a different recipe.
    """
    discarded = cell.training and cell.run.finished and not cell.run.has_result
    if discarded or _other_base(cell):
        remove(cell.run.path)
    before = read(cell) if _file(cell).is_file() else None
    other_data = before is not None and _other_data(cell, before, checksums([cell]))
    if other_data or _other_recipe(cell) or _other_base(cell):
        remove(cell.record.path)
    cell.record.path.mkdir(parents=True, exist_ok=True)
    if cell.training and cell.training.base:
        write_text(_base(cell), recipes.write(cell.training.base))


def collect(cell: Cell, command: Command) -> None:
    """Copy existing files of a command from the run folder to the record.

    A record of an earlier training, by the same recipe on the same corpus, ends here.
    """
    with repairable([cell]):
        before, now = (each.read_record().get("started") for each in (cell.record, cell.run))
    if before != now:
        for path in cell.record.path.iterdir():
            if path not in (log(cell), _base(cell)):
                remove(path)
    for kept, place in command.keeps.items():
        if (cell.run.path / place).is_file():
            with whole(cell.record.path / kept) as copy:
                shutil.copyfile(cell.run.path / place, copy)


def finish(cell: Cell, seconds: dict[str, float], error: str | None) -> None:
    """Write the end of a cell, together with earlier measurements.

    For an interrupted training, the run's own record gives the seconds.
    """
    before = read(cell) if _file(cell).is_file() else None
    commands = {str(kept): str(each) for each in cell.commands for kept in each.keeps}
    first = str(cell.commands[0])
    seconds[first] = max(seconds[first], cell.record.read_record().get("seconds", 0.0))
    corpus = Corpus(cell.training.data) if cell.training else None
    end = End(
        commands=(before.commands if before else {}) | commands,
        seconds=(before.seconds if before else {}) | seconds,
        error=error,
        checksum=corpus.checksum if corpus else None,
        train_tokens=corpus.split("train").num_tokens if corpus else 0,
    )
    write(cell, end)


def write(cell: Cell, end: End) -> None:
    """Write the end of a cell."""
    write_json(_file(cell), asdict(end))


def discard(cell: Cell) -> None:
    """Delete checkpoints and model of a cell."""
    remove(cell.run.checkpoints)
    remove(cell.run.model)


def checksums(cells: Sequence[Cell]) -> dict[str, str]:
    """Return the checksums of the cells' corpora on this machine, by folder."""
    found = {}
    for folder in dict.fromkeys(each.data for cell in cells for each in cell.commands if each.data):
        try:
            found[folder] = Corpus(folder).checksum
        except UserError:
            continue
    return found


def _file(cell: Cell) -> Path:
    return cell.record.path / "cell.json"


def _base(cell: Cell) -> Path:
    """Return the file with the recipe of the base model, absent in records of earlier versions."""
    return cell.record.path / "base.yaml"


def _other_recipe(cell: Cell) -> bool:
    return _differs(cell.record.recipe, cell.training.recipe if cell.training else None)


def _other_base(cell: Cell) -> bool:
    return _differs(_base(cell), cell.training.base if cell.training else None)


def _differs(file: Path, recipe: Settings | None) -> bool:
    if recipe is None or not file.is_file():
        return False
    return bool(recipes.differences(recipes.read(file, type(recipe)), recipe))


def _other_data(cell: Cell, end: End, checksums: Mapping[str, str]) -> bool:
    now = checksums.get(cell.training.data) if cell.training else None
    return now is not None and now != end.checksum


def _failed_otherwise(cell: Cell, end: End) -> bool:
    """Return whether a command failed that is another one now; a training keeps its recipe."""
    trained = end.commands.get(str(INSIDE.record)) if cell.training else None
    reached = any(words != trained for words in end.seconds)
    return reached and any(
        _asked(end.commands.get(str(path), str(each))) != _asked(str(each))
        for each in _measures(cell)
        for path in each.keeps
    )


def _measures(cell: Cell) -> tuple[Command, ...]:
    return cell.commands[1:] if cell.training else cell.commands


def _asked(words: str) -> list[str]:
    """Return the words of a command without the folder of a corpus, another on each machine."""
    return [
        word
        for before, word in pairwise(["", *shlex.split(words)])
        if "--data" not in (before, word)
    ]


def _measured(cell: Cell, end: End, checksums: Mapping[str, str]) -> bool:
    """Return whether the record holds the files of all commands, measured as asked."""
    kept = [cell.record.path / path for each in cell.commands for path in each.keeps]
    return all(path.is_file() for path in kept) and all(
        _asked(end.commands.get(str(path), "")) == _asked(str(each))
        and _same_corpus(cell.record.path / path, checksums.get(each.data or ""))
        for each in _measures(cell)
        for path in each.keeps
    )


def _same_corpus(file: Path, checksum: str | None) -> bool:
    """Return whether an evaluation is of a corpus, if its checksum is known here."""
    return checksum is None or load(file).targets.data == checksum
