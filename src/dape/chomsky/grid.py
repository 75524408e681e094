"""The finished cells of a benchmark as a grid of tasks by schemes, and the paper's claims on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float
from scipy.stats import ttest_ind_from_stats

from dape.chomsky.benchmark import Benchmark
from dape.chomsky.cell import Cell, finished
from dape.chomsky.tasks import TASKS
from dape.errors import UserError

ADAPTED = ("alibi", "kerple", "fire")
CLEAR = 0.05  # below this p-value of Welch's test over seeds a difference counts as clear


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells by task and scheme, where there are any; each holds the models of its seeds."""

    tasks: tuple[str, ...]
    schemes: tuple[str, ...]
    cells: Mapping[tuple[str, str], Sequence[Cell]]

    def scores(self, task: str, scheme: str) -> Float[np.ndarray, " seeds"]:
        """Return the scores of the models of a cell."""
        return np.array([each.score for each in self.cells.get((task, scheme), ())])

    def mean(self, task: str, scheme: str) -> float:
        """Return the mean score over seeds; NaN without any."""
        found = self.scores(task, scheme)
        return float(found.mean()) if len(found) else float("nan")

    def best(self, task: str) -> str:
        """Return the scheme with the highest mean score."""
        return max(
            (scheme for scheme in self.schemes if (task, scheme) in self.cells),
            key=lambda scheme: self.mean(task, scheme),
        )

    def common(self, *schemes: str) -> list[str]:
        """Return the tasks in which the order matters and that have cells of all the schemes."""
        return [
            task
            for task in self.tasks
            if not TASKS[task].permutable and all((task, each) in self.cells for each in schemes)
        ]


def gather(benchmark: Benchmark) -> Grid:
    """Return the finished cells of a benchmark.

    Raises:
        UserError: if there is none, or one was made with other settings.
    """
    found: dict[tuple[str, str], list[Cell]] = {}
    for task, scheme, seed in product(benchmark.tasks, benchmark.schemes, benchmark.seeds):
        cell = finished(benchmark, task, scheme, seed)
        if cell is not None:
            found.setdefault((task, scheme), []).append(cell)
    if not found:
        raise UserError(f"{benchmark.folder} has no finished cell; leave --finished out to train")
    return Grid(benchmark.tasks, benchmark.schemes, found)


def claims(grid: Grid) -> list[str]:
    """Return what the DAPE paper says of this benchmark, a line each with our number.

    The paper counts 11 tasks in which the order matters; Binary Multiplication is a twelfth.
    """
    lines = [
        _above(grid, f"dape-{base}", base, paper)
        for base, paper in zip(ADAPTED, ("11 of 11", "10 of 11", "11 of 11"), strict=True)
    ]
    lines += [
        _above(grid, "fire", "kerple", "9 of 14 tasks"),
        _above(grid, "kerple", "alibi", "11 of 14 tasks"),
        _above(grid, "dape3-kerple", "kerple", "8 of 11, from a third party's notes"),
    ]
    tasks = grid.common(*grid.schemes)
    best = {task: grid.best(task) for task in tasks}
    adapted = [task for task in tasks if best[task].startswith("dape")]
    if tasks:
        lines.append(f"A DAPE is best on {len(adapted)} of {len(tasks)} tasks (paper: 10 of 11).")
    lines += [
        f"{task}, dape-alibi: {grid.mean(task, 'dape-alibi'):.2f} (paper: {paper})."
        for task, paper in (("parity-check", 50.30), ("bucket-sort", 99.38))
        if (task, "dape-alibi") in grid.cells
    ]
    return [line for line in lines if line]


def _above(grid: Grid, first: str, second: str, paper: str) -> str:
    """Return on how many tasks one scheme has a higher mean score than another."""
    tasks = grid.common(first, second)
    if not tasks:
        return ""
    higher = [task for task in tasks if grid.mean(task, first) > grid.mean(task, second)]
    clear = [p_value(grid, task, first, second) < CLEAR for task in tasks]
    sides = [task in higher for task, each in zip(tasks, clear, strict=True) if each]
    return (
        f"{first} is above {second} on {len(higher)} of {len(tasks)} tasks, clearly on "
        f"{sum(sides)}, clearly below on {len(sides) - sum(sides)} (paper: {paper})."
    )


def p_value(grid: Grid, task: str, first: str, second: str) -> float:
    """Return Welch's two-sided p-value over seeds; 1 with fewer than two of them or no spread."""
    a, b = grid.scores(task, first), grid.scores(task, second)
    if min(len(a), len(b)) < 2 or max(np.ptp(a), np.ptp(b)) == 0:
        return 1.0
    moments = (moment for x in (a, b) for moment in (x.mean(), x.std(ddof=1), len(x)))
    return float(ttest_ind_from_stats(*moments, equal_var=False).pvalue)
