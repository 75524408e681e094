"""Retrieval over depth and length, as a table and as a heat map."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float

from dape.errors import UserError
from dape.evaluate.compare import gather
from dape.evaluate.prompts import TASKS
from dape.evaluate.retrieval import Retrieval
from dape.figures.style import theme
from dape.figures.tables import NOTHING, Table, refusal, tokenizers
from dape.text import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

COLUMNS, CELL = 3, (0.55, 0.3)  # panels in a row; width and height of a cell in inches
REFUSED = "#d9d9d9"


@dataclass(frozen=True, slots=True)
class Scale:
    """Name, format and colours of a metric; the values decide an end that is None."""

    name: str
    form: str
    least: float | None = None
    most: float | None = None
    better: Literal["high", "low"] = "high"

    @property
    def colours(self) -> str:
        """Return the colour map with better values bright, safe for the colour-blind."""
        return "viridis" if self.better == "high" else "viridis_r"

    def norm(self, panels: Iterable[Float[np.ndarray, "depths lengths"]]) -> "Normalize":
        """Return the scale of colours, logarithmic for ranks."""
        from matplotlib.colors import LogNorm, Normalize

        values = np.concatenate([panel.ravel() for panel in panels])
        finite = values[np.isfinite(values)].tolist()
        least = min(finite, default=-1.0) if self.least is None else self.least
        most = max(finite, default=2.0) if self.most is None else self.most
        return (Normalize if self.better == "high" else LogNorm)(least, most)


SCALES = {
    "exact": Scale("whole number right", ".0%", 0.0, 1.0),
    "accuracy": Scale("tokens of the number right", ".0%", 0.0, 1.0),
    "rank": Scale("mean rank of its tokens", ",.1f", least=1.0, better="low"),
    "log_probability": Scale("log-probability of the number (nats)", ",.1f", most=0.0),
}


def table(records: Sequence[Retrieval], metric: str = "exact") -> Table:
    """Return the mean metric over runs, by label, depth and length."""
    first, form = check(records), SCALES[metric].form
    rows, notes = [], [describe(first), *tokenizers(records)]
    for label, members in gather(records).items():
        values = mean(members, metric)
        for depth, row in zip(first.plan.depths, values, strict=True):
            cells = [NOTHING if math.isnan(value) else f"{value:{form}}" for value in row]
            rows.append([label, str(len(members)), f"{depth:g}", *cells])
        refused = {length: why for each in members for length, why in each.refused.items()}
        if refused:
            notes.append(refusal(label, refused))
    lengths = [f"{length:,}" for length in first.plan.lengths]
    return Table(
        title=f"{first.task.capitalize()}: {SCALES[metric].name}, by depth and length of the text",
        header=["scheme", "runs", "depth", *lengths],
        rows=rows,
        note=" ".join(notes),
    )


def heat_map(records: Sequence[Retrieval], metric: str = "exact") -> "Figure":
    """Draw the metric over length and depth, a panel per label, with a common scale of colours.

    A refused length is grey.
    """
    from matplotlib.figure import Figure

    first, scale = check(records), SCALES[metric]
    panels = {label: mean(members, metric) for label, members in gather(records).items()}
    trained = {label: members[0].subject.train_length for label, members in gather(records).items()}
    norm = scale.norm(panels.values())
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = columns * (0.5 + CELL[0] * len(first.plan.lengths)) + 1.6
    height = rows * (0.6 + CELL[1] * len(first.plan.depths)) + 1.1
    with theme():
        figure = Figure(figsize=(width, height))
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes, (label, values) in zip(grid.flat, panels.items(), strict=False):
            _panel(axes, values, scale, norm)
            _name_cells(axes, first)
            length = trained[label]
            title = f"{label}, trained at {length:,}" if length else label
            axes.set_title(title, fontsize=9, parse_math=False)
        for axes in [*grid.flat][len(panels) :]:
            axes.set_visible(False)
        grey = "; grey: refused" if any(each.refused for each in records) else ""
        apart = ", of different tokenizers" if tokenizers(records) else ""
        figure.supxlabel(f"length of the text (tokens{apart}){grey}", fontsize=9)
        figure.supylabel("depth of the number", fontsize=9)
        bar = figure.colorbar(grid[0, 0].collections[0], ax=grid, format=f"{{x:{scale.form}}}")
        bar.set_label(f"{first.task}: {scale.name}")
        bar.outline.set_visible(False)
    return figure


def check(records: Sequence[Retrieval]) -> Retrieval:
    """Return the first record; raise a `UserError` for records of different prompts."""
    asked = [(each.task, each.data, each.split, each.plan) for each in records]
    for other, words in zip(records[1:], asked[1:], strict=True):
        if words != asked[0]:
            raise UserError(
                f"{other.subject.run} and {records[0].subject.run} had different prompts (task, "
                "corpus, split, lengths, depths, trials or seed); run `dape eval retrieval` on all "
                "models together"
            )
    return records[0]


def mean(members: Sequence[Retrieval], metric: str) -> Float[np.ndarray, "depths lengths"]:
    """Return the mean of a metric over runs."""
    return np.mean([each.values(metric) for each in members], axis=0)


def describe(record: Retrieval) -> str:
    """Return a sentence on the prompts."""
    digits, trials = TASKS[record.task].digits, record.plan.trials
    around = "text of the corpus" if record.data else "five sentences, over and over"
    return (
        f"A number of {digits} digits in {around}, asked for at the end; "
        f"{counted(trials, 'number')} at each length and depth, the same for all. It is right if"
        " greedy decoding gives all of it."
    )


def _panel(
    axes: "Axes",
    values: Float[np.ndarray, "depths lengths"],
    scale: Scale,
    norm: "Normalize",
) -> None:
    import seaborn

    seaborn.heatmap(
        values,
        norm=norm,
        vmin=norm.vmin,  # or seaborn computes limits, and fails if every length is refused
        vmax=norm.vmax,
        cmap=scale.colours,
        annot=True,
        fmt=scale.form,
        annot_kws={"fontsize": "x-small"},
        cbar=False,
        ax=axes,
    )
    axes.set_facecolor(REFUSED)


def _name_cells(axes: "Axes", record: Retrieval) -> None:
    lengths, depths = np.arange(len(record.plan.lengths)), np.arange(len(record.plan.depths))
    axes.set_xticks(lengths + 0.5, labels=[f"{n:,}" for n in record.plan.lengths], rotation=0)
    axes.set_yticks(
        depths + 0.5, labels=[f"{depth:.0%}" for depth in record.plan.depths], rotation=0
    )
    axes.tick_params(length=0)
    axes.grid(False)
