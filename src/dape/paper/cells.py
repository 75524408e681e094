"""Cells: the trainings and measurements of an experiment, as commands.

| word | meaning |
|---|---|
| arm | a row of a comparison, as options over a recipe, usually the scheme alone |
| regime | size of the model, corpus, training length and tokens, shared by all arms of a table |
| cell | an arm in a regime with a seed: a training and measurements |
| command | words after `dape`, and the files of the run folder to keep |
"""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from dape.runs import RunFolder
from dape.train.recipe import Recipe, Retrofit

INSIDE = RunFolder(Path())  # paths below a run folder
TRAINED = {path: path for path in (INSIDE.recipe, INSIDE.record, INSIDE.metrics)}


@dataclass(frozen=True, slots=True)
class Regime:
    """The regime of a table, shared by all arms; `length` and `tokens` are of the training."""

    size: str
    corpus: str
    length: int
    tokens: int = 150_000_000

    @property
    def name(self) -> str:
        """Return the name, as `125m-arxiv-512-150M`."""
        amount = f"{self.tokens / 1e6:.3g}M" if self.tokens >= 1e6 else f"{self.tokens / 1e3:.3g}k"
        return f"{self.size}-{self.corpus}-{self.length}-{amount}"


@dataclass(frozen=True, slots=True)
class Command:
    """The words after `dape`, and the files to keep.

    keeps: paths of files below the run folder, by their paths below the record.
    """

    words: tuple[str, ...]
    keeps: Mapping[Path, Path]

    def __str__(self) -> str:
        """Return the words for a shell."""
        return shlex.join(["dape", *self.words])

    @property
    def data(self) -> str | None:
        """Return the folder of the corpus, None for the training corpus of a measured run."""
        return dict(pairwise(self.words)).get("--data")


@dataclass(frozen=True, slots=True)
class Training:
    """The training of a cell: recipes for comparison with the record, and the corpus folder.

    `base` is the recipe of the model that a fine-tuning begins with, if a cell trains the model.
    """

    regime: Regime
    seed: int
    data: str
    recipe: Recipe | Retrofit
    base: Recipe | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """The commands of a cell; a training is the first command.

    Attributes:
        home: folder of results; the last part is GROUP in the run folder runs/GROUP/NAME.
        needs: name of the cell with the training of the base model.
        minutes: minutes on an H200, if known before any run.
        timed: whether the minutes follow from a measurement.
        gpu: whether the commands measure time and memory of a GPU, and need the GPU alone.
    """

    home: Path
    name: str
    arm: str
    commands: tuple[Command, ...]
    training: Training | None = None
    needs: str | None = None
    minutes: float | None = None
    timed: bool = False
    gpu: bool = False

    @property
    def regime(self) -> Regime | None:
        """Return the regime of the training."""
        return self.training.regime if self.training else None

    @property
    def run(self) -> RunFolder:
        """Return the run folder of the cell."""
        return run_folder(self.home, self.name)

    @property
    def record(self) -> RunFolder:
        """Return the folder of small results, with the layout of a run folder."""
        return RunFolder(self.home / "cells" / self.name)


def run_folder(home: Path, name: str) -> RunFolder:
    """Return the run folder of a cell."""
    return RunFolder(Path("runs") / home.name / name)


def once(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells without repeated names, with the commands of all cells of a name."""
    found: dict[tuple[Path, str], Cell] = {}
    for cell in cells:
        key = cell.home, cell.name
        known = found.setdefault(key, cell)
        commands = {each.words: each for each in (*known.commands, *cell.commands)}
        found[key] = replace(known, commands=tuple(commands.values()))
    return list(found.values())


def kept_files(cells: Iterable[Cell], folder: str) -> list[tuple[Cell, Path]]:
    """Return the files that lie in a folder of the records, each with its cell."""
    kept = ((cell, path) for cell in cells for each in cell.commands for path in each.keeps)
    files = ((cell, cell.record.path / path) for cell, path in kept if path.parts[0] == folder)
    return [(cell, file) for cell, file in files if file.is_file()]


def by_regime(cells: Iterable[Cell]) -> dict[Regime, list[Cell]]:
    """Return the trainings by regime, in order of appearance."""
    found: dict[Regime, list[Cell]] = {}
    for cell in cells:
        if cell.regime:
            found.setdefault(cell.regime, []).append(cell)
    return found
