"""What is kept of a cell when its weights are gone, and whether it is finished.

HOME/cells/NAME holds the files that the steps keep (recipe, run.json, metrics, evaluations), the
output of the commands, and `cell.json`, which says how the cell ended.
"""

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dape.data.shards import Corpus
from dape.errors import UserError
from dape.paper.cells import Cell, Step
from dape.train import config

FILE, LOG = "cell.json", "log.txt"
State = Literal["finished", "failed", "missing", "changed"]


@dataclass(frozen=True, slots=True)
class Record:
    """How a cell ended.

    seconds: of each command, by the command.
    error: why it ended before its last command, for a reason that belongs to the model: it
        diverged, or memory did not suffice. Such a cell is a result and is not run again.
    checksum, train_tokens: of the corpus.
    """

    seconds: dict[str, float]
    checksum: str
    train_tokens: int
    error: str | None = None
    files: dict[str, str] = field(default_factory=dict)

    def save(self, cell: Cell) -> None:
        """Write `cell.json`."""
        cell.record.mkdir(parents=True, exist_ok=True)
        (cell.record / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def load(cell: Cell) -> Record | None:
    """Return how a cell ended, None if it did not."""
    file = cell.record / FILE
    return Record(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def ended(cell: Cell) -> Record:
    """Return how a cell ended that did."""
    record = load(cell)
    assert record is not None, cell.name
    return record


def run_record(cell: Cell) -> dict[str, Any]:
    """Return what `run.json` says of the training."""
    return json.loads((cell.record / "run.json").read_text(encoding="utf-8"))


def history(cell: Cell) -> list[dict[str, Any]]:
    """Return the logged steps of the training."""
    lines = (cell.record / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def state(cell: Cell, checksums: Mapping[str, str]) -> State:
    """Return whether a cell is finished.

    `checksums` holds those of the corpora that are here, by folder. A record of other settings,
    other data or another measurement makes the cell `changed`: it is to be run again.
    """
    record = load(cell)
    if record is None:
        return "missing"
    if checksums.get(cell.data, record.checksum) != record.checksum or _differs(cell, record):
        return "changed"
    return "failed" if record.error else "finished"


def _other_recipe(cell: Cell) -> bool:
    file = cell.record / "config.yaml"
    return file.is_file() and bool(config.differences(config.read(file), cell.recipe))


def _differs(cell: Cell, record: Record) -> bool:
    if _other_recipe(cell) or record.error:
        return _other_recipe(cell)
    measured = {name: step for step in cell.steps[1:] for name in step.keeps}
    return any(
        record.files.get(name) != command(step) or not (cell.record / name).is_file()
        for name, step in measured.items()
    )


def command(step: Step) -> str:
    """Return the command of a step as a reader types it."""
    return shlex.join(["dape", *step.words])


def prepare(cell: Cell) -> None:
    """Make the folder of the record, without what another recipe left in it."""
    if _other_recipe(cell):
        shutil.rmtree(cell.record)
    cell.record.mkdir(parents=True, exist_ok=True)


def collect(cell: Cell, step: Step) -> None:
    """Copy what a step keeps, as far as it is there, from the run folder to the record."""
    for name, place in step.keeps.items():
        if (cell.run / place).is_file():
            shutil.copyfile(cell.run / place, cell.record / name)


def finish(cell: Cell, seconds: dict[str, float], error: str | None) -> None:
    """Write how a cell ended, beside what was measured of it before."""
    before, corpus = load(cell), Corpus(cell.data)
    files = {name: command(step) for step in cell.steps for name in step.keeps}
    Record(
        seconds=(before.seconds if before else {}) | seconds,
        checksum=corpus.checksum,
        train_tokens=corpus.split("train").num_tokens,
        error=error,
        files=(before.files if before else {}) | files,
    ).save(cell)


def discard(cell: Cell) -> None:
    """Delete the weights of a cell: its checkpoints and its model."""
    for name in ("checkpoints", "model"):
        shutil.rmtree(cell.run / name, ignore_errors=True)


def checksums(cells: list[Cell]) -> dict[str, str]:
    """Return the checksums of the cells' corpora that are here, by folder."""
    found = {}
    for folder in dict.fromkeys(cell.data for cell in cells):
        try:
            found[folder] = Corpus(folder).checksum
        except UserError:
            continue
    return found
