"""Results of the Chomsky benchmark: the grid of cells, sections of results, and checks of claims.

| check | number | reproduced, with p < 0.05 |
|---|---|---|
| `Above` | tasks where the candidate's mean score is above the baseline's | on more than half |
| `BestOf` | tasks with the highest mean score for a DAPE | on more than by an equal chance |
| `Near` | difference of a mean score and the published score | within 2 points |

Only tasks that depend on the order of the input count. Tasks with equal scores on both sides, such
as two scores of 100, are left out of the tests. The tests are the two-sided sign test over
tasks for `Above`, the binomial test against an equal chance for every scheme for `BestOf`, and two
one-sided t-tests over seeds for `Near`. On a task a difference is clear with p < 0.05 by Welch's
test over seeds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dape.chomsky import cell as cells
from dape.chomsky import maps
from dape.chomsky.benchmark import differences
from dape.chomsky.grid import Grid, arrange, p_value
from dape.chomsky.tasks import TASKS
from dape.errors import UserError
from dape.evaluate.significance import PairedTest, spreads
from dape.figures import chomsky as figures
from dape.figures import chomsky_map
from dape.paper.cells import Cell, kept_files
from dape.paper.claims import SIGNIFICANT, Check, Evidence, Finding, Outcome
from dape.paper.sections import Section

NEAR = 2.0  # points of a score


def grids(ended: Sequence[Cell]) -> list[Grid]:
    """Return the grid of the encoders among the cells, if any.

    Raises:
        UserError: for cells with settings different from the first cell's.
    """
    found = [cells.load(file) for _, file in kept_files(ended, "cells")]
    for each in found:
        changed = differences(found[0].settings, each.settings)
        if changed:
            raise UserError(
                f"{each.task}, {each.scheme}, seed {each.seed} was made with {', '.join(changed)}; "
                "remove the record and run the cell again"
            )
    schemes = tuple(dict.fromkeys(each.scheme for each in found))
    tasks = tuple(task for task in TASKS if any(each.task == task for each in found))
    return [arrange(tasks, schemes, found)] if found else []


def scores(ended: Sequence[Cell]) -> list[Section]:
    """Return the section of scores by task and scheme."""
    return [
        Section(
            "scores",
            (figures.scores(grid), figures.best(grid), figures.published()),
            figures.heat_map(grid),
            "Mean scores, tasks by schemes. The colour is the gain over a predictor blind to the"
            f" input: 0 at the predictor's score, 1 at 100. {figures.made(grid)}",
        )
        for grid in grids(ended)
    ]


def lengths(ended: Sequence[Cell]) -> list[Section]:
    """Return the section of accuracies over length."""
    return [
        Section(
            "lengths",
            (),
            figures.over_length(grid),
            "Percent of scored symbols right against the length of the input, means over seeds. The"
            " lengths of training are shaded. Grey: the scores without reading the input, dotted"
            " for a constant answer, dashed for the blind predictor.",
        )
        for grid in grids(ended)
    ]


def training(ended: Sequence[Cell]) -> list[Section]:
    """Return the section of training losses."""
    caption = "Training loss against steps, means over seeds."
    return [
        Section("training", (figures.within(grid),), figures.over_training(grid), caption)
        for grid in grids(ended)
    ]


def map_sections(ended: Sequence[Cell]) -> list[Section]:
    """Return the sections of A, B and f(A, B) for a placeholder."""
    made = [maps.load(file) for _, file in kept_files(ended, "maps")]
    return [
        Section(
            f"map-{each.task}-{each.scheme}",
            (chomsky_map.table(each),),
            chomsky_map.draw(each),
            "Scores A, bias B, adapter f(A, B) and attention of the middle placeholder over all"
            f" tokens, a line a head, means over {each.examples} inputs. Placeholders are shaded,"
            " the dotted line is the query.",
        )
        for each in made
    ]


SECTIONS: dict[str, Callable[[Sequence[Cell]], list[Section]]] = {
    "scores": scores,
    "lengths": lengths,
    "training": training,
    "maps": map_sections,
}


@dataclass(frozen=True, slots=True)
class Above(Check):
    """The candidate is above the baseline on most tasks; `paper` quotes the paper."""

    candidate: str
    baseline: str
    paper: str

    def find(self, evidence: Evidence) -> Finding | None:
        """Return the finding from the records, or None without records."""
        from scipy.stats import binomtest

        grid = _grid(evidence)
        pair = self.candidate, self.baseline
        tasks = grid.common(*pair) if grid else []
        if grid is None or not tasks:
            return None
        gains = [grid.mean(task, pair[0]) - grid.mean(task, pair[1]) for task in tasks]
        higher, differ = sum(gain > 0 for gain in gains), sum(gain != 0 for gain in gains)
        clear = [gain for task, gain in zip(tasks, gains, strict=True) if _clear(grid, task, *pair)]
        above = sum(gain > 0 for gain in clear)
        test = PairedTest(
            name="sign test over tasks (scipy.stats.binomtest)",
            pairs=len(tasks),
            difference=float(np.mean(gains)),
            p_value=float(binomtest(higher, differ).pvalue) if differ else 1.0,
        )
        return Finding(
            outcome=_outcome(test.p_value, higher > differ / 2),
            number=f"{self.candidate} above {self.baseline} on {higher} of {len(tasks)} tasks,"
            f" clearly on {above}, clearly below on {len(clear) - above} (paper: {self.paper})",
            seeds=min(len(grid.scores(task, scheme)) for task in tasks for scheme in pair),
            test=test,
        )


@dataclass(frozen=True, slots=True)
class BestOf(Check):
    """A DAPE is the best of all schemes on most tasks; `paper` quotes the paper."""

    paper: str

    def find(self, evidence: Evidence) -> Finding | None:
        """Return the finding from the records, or None without records."""
        from scipy.stats import binomtest

        grid = _grid(evidence)
        adapted = (
            {scheme for scheme in grid.schemes if scheme.startswith("dape")} if grid else set()
        )
        tasks = grid.common(*grid.schemes) if grid else []
        if grid is None or not tasks or not adapted or len(adapted) == len(grid.schemes):
            return None
        wins, decided = _wins([grid.best(task) for task in tasks], adapted)
        share = len(adapted) / len(grid.schemes)
        p = float(binomtest(wins, decided, share).pvalue) if decided else 1.0
        level = f", level on {len(tasks) - decided}" if decided < len(tasks) else ""
        return Finding(
            outcome=_outcome(p, wins > share * decided),
            number=f"a DAPE best on {wins} of {len(tasks)} tasks{level}, {len(adapted)} of"
            f" {len(grid.schemes)} schemes with DAPE (paper: {self.paper})",
            seeds=min(len(grid.scores(task, each)) for task in tasks for each in grid.schemes),
            test=PairedTest(
                "binomial test over tasks (scipy.stats.binomtest)", decided, float(wins), p
            ),
        )


@dataclass(frozen=True, slots=True)
class Near(Check):
    """The mean score of a scheme on a task equals the published score within 2 points."""

    task: str
    scheme: str
    published: float

    def find(self, evidence: Evidence) -> Finding | None:
        """Return the finding from the records, or None without records."""
        from scipy.stats import ttest_1samp

        grid = _grid(evidence)
        found = grid.scores(self.task, self.scheme) if grid else np.array([])
        if not len(found):
            return None
        off = float(found.mean()) - self.published
        within = abs(off) < NEAR
        p = math.nan
        if spreads(found):
            sides = [
                float(ttest_1samp(found, self.published + edge, alternative=side).pvalue)
                for edge, side in (
                    ((-NEAR, "greater"), (NEAR, "less"))
                    if within
                    else ((NEAR * np.sign(off), "greater" if off > 0 else "less"),)
                )
            ]
            p = max(sides)
        return Finding(
            outcome=_outcome(p, within),
            number=f"{self.scheme} {found.mean():.2f} on {self.task} (paper: {self.published:.2f};"
            f" blind to the input: {TASKS[self.task].blind:.1f})",
            seeds=len(found),
            test=PairedTest(
                "two one-sided t over seeds (scipy.stats.ttest_1samp)", len(found), off, p
            ),
        )


def _grid(evidence: Evidence) -> Grid | None:
    return next((each for each in evidence if isinstance(each, Grid)), None)


def _wins(best: Sequence[set[str]], schemes: set[str]) -> tuple[int, int]:
    """Return the tasks won by some schemes, and the tasks won by these or by others alone."""
    wins = sum(each <= schemes for each in best)
    return wins, wins + sum(not each & schemes for each in best)


def _clear(grid: Grid, task: str, first: str, second: str) -> bool:
    return p_value(grid, task, first, second) < SIGNIFICANT


def _outcome(p: float, holds: bool) -> Outcome:
    if not p < SIGNIFICANT:
        return "not decidable at this scale"
    return "reproduced" if holds else "not reproduced"
