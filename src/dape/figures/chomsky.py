"""The Chomsky benchmark as tables and figures."""

import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dape.chomsky import benchmark as benchmarks
from dape.chomsky.benchmark import Benchmark
from dape.chomsky.cell import Cell
from dape.chomsky.grid import Grid, gather
from dape.chomsky.published import PUBLISHED
from dape.chomsky.tasks import TASKS
from dape.figures.style import ACCENT, looks, save, theme
from dape.figures.tables import NOTHING, Table
from dape.files import check_writable, write_text
from dape.provenance import INSTALLED
from dape.text import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3  # panels in a row
SMOOTHED = 10  # lengths averaged in a point of a curve
_Curve = tuple[str, Sequence[Any], Sequence[Any]]  # scheme, x, y


def write(benchmark: Benchmark, argv: Sequence[str]) -> list[Path]:
    """Write recipe, tables and figures of the finished cells, and return the files.

    Raises:
        UserError: if no cell is finished.
    """
    grid, out = gather(benchmark), benchmark.folder
    check_writable(out / "table.md")
    write_text(out / "recipe.yaml", benchmarks.write(benchmark))
    write_text(out / "table.md", page(grid, list(argv)))
    figures = {
        "scores.svg": heat_map(grid),
        "lengths.svg": over_length(grid),
        "training.svg": over_training(grid),
    }
    for name, figure in figures.items():
        save(figure, out / name)
    return [out / name for name in ("recipe.yaml", "table.md", *figures)]


def page(grid: Grid, argv: list[str]) -> str:
    """Return all tables as a page of Markdown, with the settings behind the numbers."""
    tables = [scores(grid), best(grid), within(grid), published()]
    parts = [
        "# The Chomsky-hierarchy benchmark",
        *(table.markdown() for table in tables),
        f"{made(grid)}\n`{shlex.join(['dape', *argv])}`",
    ]
    return "\n\n".join(parts) + "\n"


def scores(grid: Grid) -> Table:
    """Return mean and standard deviation of the scores, beside scores without reading."""
    first = next(iter(grid.cells.values()))[0]
    lengths = f"{first.trained + 1} to {len(first.accuracy)}"
    return _table(
        grid,
        f"Score: percent of scored symbols right, mean over lengths {lengths}",
        lambda found: _spread([each.score for each in found]),
        "± one standard deviation over seeds.",
    )


def best(grid: Grid) -> Table:
    """Return the highest score over seeds, the headline number of the original papers."""
    return _table(
        grid,
        "Highest score over seeds",
        lambda found: f"{max(each.score for each in found):.1f}",
        "The maximum is chosen on test data, as in the original papers.",
    )


def within(grid: Grid) -> Table:
    """Return the accuracy of each model at the lengths of training, and the last loss."""
    return _table(
        grid,
        "Within the lengths of training: percent right on new examples, and the last training loss",
        lambda found: (
            f"{np.mean([each.score_within for each in found]):.1f} "
            f"({np.mean([each.loss[-1][1] for each in found]):.3f})"
        ),
        "The loss, in nats a symbol, is the mean over the last percent of the steps.",
    )


def _table(grid: Grid, title: str, cell: Callable[[Sequence[Cell]], str], note: str) -> Table:
    rows = []
    for name in grid.tasks:
        task = TASKS[name]
        found = (grid.cells.get((name, scheme)) for scheme in grid.schemes)
        cells = [NOTHING if each is None else cell(each) for each in found]
        row = [name + "*" * task.permutable, f"{task.chance:.1f}", f"{task.blind:.1f}", *cells]
        rows.append(row)
    note += (
        " constant, blind: without reading the input, means over the lengths 41 to 500."
        " * the order of the input does not matter."
    )
    return Table(title, ["task", "constant", "blind", *grid.schemes], rows, note)


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


def published() -> Table:
    """Return published scores, with the reliability of the numbers."""
    rows = [
        [each.task, each.source, each.model, f"{each.score:.1f}", each.certainty]
        for each in PUBLISHED
    ]
    return Table("Published", ["task", "source", "model", "score", "how sure"], rows, "")


def made(grid: Grid) -> str:
    """Return settings, cost, devices, commits and versions of the numbers."""
    cells = [each for found in grid.cells.values() for each in found]
    first = cells[0]
    training, model = first.settings["training"], first.settings["model"]
    hours = sum(sum(each.seconds.values()) for each in cells) / 3600
    trained = sum(each.seconds["training"] for each in cells)
    rate = training["steps"] * len(cells) / trained if trained else math.nan
    devices, commits = (
        ", ".join(sorted({each.provenance[name] or INSTALLED for each in cells}))
        for name in ("device", "commit")
    )
    versions = ", ".join(f"{k} {v}" for k, v in first.provenance["versions"].items())
    return (
        f"{counted(len(cells), 'model')} of width {model['hidden_size']}, "
        f"{training['steps']:,} steps of {training['batch_size']} examples of lengths"
        f" 1 to {training['length']}, rate "
        f"{training['learning_rate']:g}, {training['precision']}. {hours:.2f} device hours on "
        f"{devices}; {rate:,.0f} model steps a device second. Commit {commits}; {versions}."
    )


def heat_map(grid: Grid) -> "Figure":
    """Draw the mean scores, tasks by schemes.

    The colour is the gain over a blind predictor: 0 at the predictor's score, 1 at 100.
    """
    import seaborn
    from matplotlib.figure import Figure

    scores = np.array([[grid.mean(task, each) for each in grid.schemes] for task in grid.tasks])
    blind = np.array([[TASKS[task].blind] for task in grid.tasks])
    with theme():
        figure = Figure(figsize=(3.4 + 0.62 * len(grid.schemes), 1.6 + 0.3 * len(grid.tasks)))
        axes = figure.subplots()
        seaborn.heatmap(
            (scores - blind) / (100 - blind),
            vmin=0,
            vmax=1,
            cmap="viridis",
            annot=scores,
            fmt=".0f",
            annot_kws={"fontsize": "small"},
            cbar_kws={"label": "gain over a blind predictor"},
            ax=axes,
        )
        axes.set_xticks(np.arange(len(grid.schemes)) + 0.5, grid.schemes, rotation=40, ha="right")
        axes.set_yticks(np.arange(len(grid.tasks)) + 0.5, grid.tasks, rotation=0)
        axes.tick_params(length=0)
        axes.grid(False)
    return figure


def over_length(grid: Grid) -> "Figure":
    """Draw accuracy against length, a panel per task, with the lengths of training shaded.

    A point is the mean over ten lengths and the seeds. Grey lines are the scores without reading,
    dotted for the constant answer.
    """
    return _panels(grid, "symbols of the input", "percent right", _length_panel)


def over_training(grid: Grid) -> "Figure":
    """Draw the training loss against steps, a panel per task, the mean over seeds."""
    return _panels(grid, "steps", "training loss (nats a symbol)", _training_panel)


def _length_panel(axes: "Axes", grid: Grid, task: str) -> None:
    for score, dashes in ((TASKS[task].chance, ":"), (TASKS[task].blind, "--")):
        axes.axhline(score, color=ACCENT, linewidth=0.8, linestyle=dashes)
    cells = _cells(grid, task)
    _lines(axes, grid, [(each.scheme, *_smoothed(each.accuracy)) for each in cells])
    axes.axvspan(1, cells[0].trained, color=ACCENT, alpha=0.12, linewidth=0)
    axes.set_ylim(0, 102)


def _training_panel(axes: "Axes", grid: Grid, task: str) -> None:
    curves: list[_Curve] = []
    for each in _cells(grid, task):
        steps, losses = zip(*each.loss, strict=True)
        curves.append((each.scheme, steps, losses))
    _lines(axes, grid, curves)
    axes.set_ylim(bottom=0)


def _panels(grid: Grid, x: str, y: str, draw: Callable[["Axes", Grid, str], None]) -> "Figure":
    from matplotlib.figure import Figure

    tasks = [task for task in grid.tasks if _cells(grid, task)]
    columns = min(COLUMNS, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    with theme():
        figure = Figure(figsize=(2.6 * columns + 1.8, 1.7 * rows + 0.5))
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, task in zip(panels, tasks, strict=False):
            draw(axes, grid, task)
            axes.set_title(task, fontsize=9)
        for axes in panels[len(tasks) :]:
            axes.set_visible(False)
        legends = [axes.get_legend() for axes in panels[: len(tasks)]]
        handles = {
            text.get_text(): handle
            for legend in legends
            for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
        }
        for legend in legends:
            legend.remove()
        names = [scheme for scheme in grid.schemes if scheme in handles]
        figure.legend([handles[name] for name in names], names, loc="outside right center")
        figure.supxlabel(x, fontsize=9)
        figure.supylabel(y, fontsize=9)
    return figure


def _lines(axes: "Axes", grid: Grid, curves: Sequence[_Curve]) -> None:
    """Draw a line per scheme, the mean of the curves."""
    import seaborn

    points = [(label, x, y) for label, xs, ys in curves for x, y in zip(xs, ys, strict=True)]
    labels, x, y = map(list, zip(*points, strict=True))
    style = looks({scheme: scheme for scheme in grid.schemes})
    present = [scheme for scheme in grid.schemes if scheme in labels]
    seaborn.lineplot(
        x=x, y=y, hue=labels, style=labels, hue_order=present, style_order=present, errorbar=None,
        palette=style["palette"], dashes=style["dashes"], linewidth=1.1, ax=axes,
    )  # fmt: skip


def _cells(grid: Grid, task: str) -> list[Cell]:
    """Return the cells of a task, scheme by scheme."""
    return [each for scheme in grid.schemes for each in grid.cells.get((task, scheme), ())]


def _smoothed(accuracy: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the middles of groups of lengths, and the mean accuracy of each group."""
    starts = range(0, len(accuracy), SMOOTHED)
    parts = [accuracy[start : start + SMOOTHED] for start in starts]
    middles = [start + (len(part) + 1) / 2 for start, part in zip(starts, parts, strict=True)]
    return middles, [sum(part) / len(part) for part in parts]
