"""The plan of an experiment: finished cells, missing cells, and the cost of missing cells."""

import heapq
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import get_args

from dape.data.shards import Corpus
from dape.errors import UserError
from dape.figures.tables import NOTHING, Table
from dape.paper import record
from dape.paper.cells import Cell
from dape.paper.record import State
from dape.text import counted
from dape.train.recipe import Retrofit

# Tokens a second of training on an H200 with CUDA graphs, and factors for slower schemes. The speed
# at 350M is that at 125M, by the number of parameters.
TOKENS_PER_SECOND = {"small": 1_000_000, "125m": 450_000, "350m": 170_000}
SLOWER = {
    "dape3": 1.5,
    "dape-fire": 1.4,
    "fire": 1.4,
    "dape": 1.1,
    "rope": 1.1,
    "talking-heads": 1.4,
    "cope": 2.6,
    "transformer-xl": 2.6,
}
ESTIMATE = "~"  # before minutes that include estimates
# Minutes of starting, compiling and measuring on an H200.
AROUND = {"small": 1.3, "125m": 1.8, "350m": 3.0}


@dataclass(frozen=True, slots=True)
class Planned:
    """A cell with state and GPU minutes (None if unknown), measured or an `estimate`."""

    cell: Cell
    state: State
    minutes: float | None
    estimate: bool

    @property
    def due(self) -> bool:
        """Return whether the cell is to be run."""
        return self.state in ("missing", "changed")


def plan(cells: Sequence[Cell]) -> list[Planned]:
    """Return the cells with state and cost, measured for cells like a finished cell."""
    here = record.checksums(cells)
    with record.repairable(cells):
        states = {cell.name: record.state(cell, here) for cell in cells}
        spent = {
            cell.name: record.minutes([cell]) for cell in cells if states[cell.name] == "finished"
        }
    return [Planned(cell, states[cell.name], *_price(cell, cells, spent)) for cell in cells]


def asked(
    planned: Sequence[Planned], only: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Planned]:
    """Return the cells of the arms `only` and of the `seeds`, if given."""
    return [
        each
        for each in planned
        if (not only or each.cell.arm in only)
        and (not seeds or each.cell.training is None or each.cell.training.seed in seeds)
    ]


def choose(
    planned: Sequence[Planned],
    only: Sequence[str] = (),
    retry: bool = False,
    seeds: Sequence[int] = (),
    turns: Mapping[str, int] | None = None,
) -> list[Cell]:
    """Return the cells to run, limited to arms `only` and `seeds` if given.

    Cells run by their `turns`, by name, and the longest of a turn first. With `retry`, cells that
    diverged or ran out of memory run again. A cell whose model another cell needs runs too if due,
    or if the model is missing.
    """
    chosen = [
        each
        for each in asked(planned, only, seeds)
        if each.due or (retry and each.state == "failed")
    ]
    needed = {each.cell.needs for each in chosen}
    chosen += [
        each
        for each in planned
        if each.cell.name in needed
        and each not in chosen
        and (each.due or not each.cell.run.has_model)
    ]
    turn = turns or {}
    chosen.sort(key=lambda each: (turn.get(each.cell.name, 0), -(each.minutes or 0)))
    return [each.cell for each in chosen]


def pack(
    cells: Sequence[Cell],
    prices: Mapping[str, float],
    devices: int,
    minutes: float,
    overlap: float = 0.0,
) -> list[Cell]:
    """Return the cells in an order that fills `minutes` on every device.

    Cells that end in time together come first, from the longest to the shortest, so that no long
    cell of a late turn finds too little time. Early cells are taken before later cells. The others
    follow in the old order, for time that is left.

    Args:
        prices: minutes by name of cell; a cell without price is not taken.
        overlap: minutes before the end of a cell at which the next cell starts.
    """
    taken: list[Cell] = []
    for cell in cells:
        if cell.name in prices:
            longer = [each for each in taken if prices[each.name] >= prices[cell.name]]
            more = [*longer, cell, *taken[len(longer) :]]
            alone = [prices[each.name] - overlap for each in more]
            if _last_end(alone, devices) <= minutes - overlap:
                taken = more
    return taken + [cell for cell in cells if cell not in taken]


def _last_end(minutes: Sequence[float], devices: int) -> float:
    """Return the last end of cells that start in order, each on the first free device."""
    free = [0.0] * devices
    for each in minutes:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def without_corpus(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Return the cells without a corpus on this machine, by the missing folder."""
    here, found = _corpora(cells), dict[str, list[Cell]]()
    for cell in cells:
        for folder in _longest(cell):
            if folder not in here:
                found.setdefault(folder, []).append(cell)
    return found


def without_model(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Return the cells without a pretrained model on this machine, by the missing folder."""
    found = dict[str, list[Cell]]()
    for cell in cells:
        recipe = cell.training.recipe if cell.training and not cell.needs else None
        if isinstance(recipe, Retrofit) and not Path(recipe.model.base).is_dir():
            found.setdefault(recipe.model.base, []).append(cell)
    return found


def long_documents(cells: Sequence[Cell]) -> dict[tuple[str, int], tuple[int, list[Cell]]]:
    """Return the number of test documents beyond the longest window, and the cells.

    Keys are corpus folder and longest window. A missing corpus is left out.
    """
    here, found = _corpora(cells), dict[tuple[str, int], tuple[int, list[Cell]]]()
    for cell in cells:
        for folder, longest in _longest(cell).items():
            if longest == 0 or folder not in here:
                continue
            if (folder, longest) not in found:
                texts = here[folder].split("test").document_lengths - 1  # without end of text
                found[folder, longest] = int((texts > longest).sum()), []
            found[folder, longest][1].append(cell)
    return found


def _corpora(cells: Sequence[Cell]) -> dict[str, Corpus]:
    """Return the corpora on this machine that cells read, by folder."""
    found = {}
    for folder in dict.fromkeys(folder for cell in cells for folder in _longest(cell)):
        with suppress(UserError):
            found[folder] = Corpus(folder)
    return found


def _longest(cell: Cell) -> dict[str, int]:
    """Return the longest measured window by corpus folder, 0 for a corpus of training alone."""
    if cell.training is None:
        return {}
    found = {cell.training.data: 0}
    for command in cell.commands:
        given = dict(pairwise(command.words))
        folder = command.data or cell.training.data
        lengths = given.get("--lengths", "0")
        found[folder] = max(found.get(folder, 0), int(lengths.rpartition(",")[2]))
    return found


def table(
    planned: Sequence[Planned], devices: int, chosen: Collection[Cell] | None = None
) -> Table:
    """Return the plan as a table, with the cost of the cells that `choose` has chosen.

    By default these are the cells that are due.

    A row is a regime, a group of tasks for encoders, or the lengths of a measurement.
    """
    groups: dict[str, list[Planned]] = {}
    for each in planned:
        group = each.cell.name.rpartition("/")[0] or each.cell.name
        name = each.cell.regime.name if each.cell.regime else group
        groups.setdefault(name, []).append(each)
    if chosen is None:
        chosen = [each.cell for each in planned if each.due]
    names = {cell.name for cell in chosen}
    due = [each for each in planned if each.cell.name in names]
    rows = [_row(name, group, names) for name, group in {**groups, "all": planned}.items()]
    note = "Changed: settings, data or measurements differ now; runs again."
    left = [each.minutes for each in due if each.minutes is not None]
    if left:
        hours = max(sum(left) / devices, *left) / 60
        note += f" About {hours:.1f} hours on {counted(devices, 'GPU')}."
    if any(each.estimate for each in due):
        note += f" {ESTIMATE}: includes estimates, for arms without a finished cell."
    if any(each.minutes is None for each in due):
        note += f" {NOTHING}: no price was measured (docs/chomsky.md for encoders)."
    return Table("Plan", ["regime", *get_args(State), "GPU minutes due"], rows, note)


def _price(
    cell: Cell, cells: Sequence[Cell], spent: Mapping[str, float]
) -> tuple[float | None, bool]:
    """Return the minutes of a cell, if known, and whether the minutes are an estimate."""
    measured = spent.get(cell.name) or _alike(cell, cells, spent)
    if measured is not None:
        return measured, False
    if cell.minutes is None:
        minutes = _estimate(cell)
        return minutes, minutes is not None
    return cell.minutes * (1.0 if cell.timed else _correction(cell, cells, spent)), not cell.timed


def _correction(cell: Cell, cells: Sequence[Cell], spent: Mapping[str, float]) -> float:
    """Return spent over estimated minutes of finished measurements, 1 for a training."""
    if cell.regime is not None:
        return 1.0
    alike = (each for each in cells if each.regime is None and not each.timed)
    found = [
        spent[each.name] / each.minutes for each in alike if each.minutes and each.name in spent
    ]
    return median(found) if found else 1.0


def _alike(cell: Cell, cells: Sequence[Cell], spent: Mapping[str, float]) -> float | None:
    """Return the minutes of similar finished cells, for the tokens of the cell.

    The minutes around the updates do not grow with the tokens.
    """
    regime = cell.regime
    if regime is None:
        return None
    alike = []
    for other in cells:
        if other.regime is None or other.name not in spent:
            continue
        if (other.arm, other.regime.size) == (cell.arm, regime.size):
            around = min(AROUND.get(regime.size, 0.0), spent[other.name])
            times = regime.tokens / other.regime.tokens
            alike.append(around + times * (spent[other.name] - around))
    return median(alike) if alike else None


def _estimate(cell: Cell) -> float | None:
    """Return the minutes of a cell by tokens and speed, for a known size."""
    regime = cell.regime
    if regime is None or regime.size not in TOKENS_PER_SECOND:
        return None
    factor = max((times for part, times in SLOWER.items() if part in cell.arm), default=1.0)
    return regime.tokens * factor / TOKENS_PER_SECOND[regime.size] / 60 + AROUND[regime.size]


def _row(name: str, group: Sequence[Planned], chosen: Collection[str]) -> list[str]:
    counts = [str(sum(each.state == state for each in group)) for state in get_args(State)]
    due = [each for each in group if each.cell.name in chosen]
    known = [each.minutes for each in due if each.minutes is not None]
    mark = ESTIMATE if any(each.estimate for each in due) else ""
    return [name, *counts, f"{mark}{sum(known):.0f}" if len(known) == len(due) else NOTHING]
