"""The finished cells of a benchmark as a grid of tasks by schemes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float
from scipy.stats import ttest_ind_from_stats

from dape.chomsky.benchmark import Benchmark
from dape.chomsky.cell import Cell, finished
from dape.chomsky.tasks import TASKS
from dape.errors import UserError
from dape.evaluate.significance import spreads


@dataclass(frozen=True, slots=True)
class Grid:
    """Finished cells by task and scheme, with a cell per seed."""

    tasks: tuple[str, ...]
    schemes: tuple[str, ...]
    cells: Mapping[tuple[str, str], Sequence[Cell]]

    def scores(self, task: str, scheme: str) -> Float[np.ndarray, " seeds"]:
        """Return the scores of a task and a scheme, by seed."""
        return np.array([each.score for each in self.cells.get((task, scheme), ())])

    def mean(self, task: str, scheme: str) -> float:
        """Return the mean score over seeds; NaN without any."""
        found = self.scores(task, scheme)
        return float(found.mean()) if len(found) else float("nan")

    def best(self, task: str) -> set[str]:
        """Return the schemes with the highest mean score, several if the scores are equal."""
        means = {
            scheme: self.mean(task, scheme)
            for scheme in self.schemes
            if (task, scheme) in self.cells
        }
        highest = max(means.values())
        return {scheme for scheme, mean in means.items() if mean == highest}

    def common(self, *schemes: str) -> list[str]:
        """Return the tasks that depend on the order of the input and have cells of all schemes."""
        return [
            task
            for task in self.tasks
            if not TASKS[task].permutable and all((task, each) in self.cells for each in schemes)
        ]


def gather(benchmark: Benchmark) -> Grid:
    """Return the finished cells of a benchmark.

    Raises:
        UserError: without finished cells, or for a cell with other settings.
    """
    found = (
        finished(benchmark, *place)
        for place in product(benchmark.tasks, benchmark.schemes, benchmark.seeds)
    )
    cells = [cell for cell in found if cell is not None]
    if not cells:
        raise UserError(f"{benchmark.folder} has no finished cell; run `dape chomsky train`")
    return arrange(benchmark.tasks, benchmark.schemes, cells)


def arrange(tasks: tuple[str, ...], schemes: tuple[str, ...], cells: Iterable[Cell]) -> Grid:
    """Return cells as a grid, with tasks and schemes in the given order."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.task, cell.scheme), []).append(cell)
    return Grid(tasks, schemes, found)


def p_value(grid: Grid, task: str, first: str, second: str) -> float:
    """Return Welch's two-sided p-value over seeds; NaN with fewer than two seeds or no spread."""
    a, b = grid.scores(task, first), grid.scores(task, second)
    if min(len(a), len(b)) < 2 or not (spreads(a) or spreads(b)):
        return math.nan
    moments = (moment for x in (a, b) for moment in (x.mean(), x.std(ddof=1), len(x)))
    return float(ttest_ind_from_stats(*moments, equal_var=False).pvalue)
