"""Curves: a metric over length, loss over context, and training."""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dape.evaluate.compare import METRICS, Group
from dape.figures.style import ACCENT, looks, theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL = 32  # characters in a line of a label
MARGIN = 0.05  # below the lowest point, of the height of a figure with a top
LOG_RATIO = 4  # least ratio of largest and smallest value for a logarithmic y axis


@dataclass(frozen=True, slots=True)
class Point:
    """A point of the line `label`; points of different seeds share x."""

    label: str
    x: float
    y: float


def over_length(
    groups: Sequence[Group], metric: str = "perplexity", top: float | None = None
) -> "Figure":
    """Draw a metric against the window length: mean over seeds, and a shaded standard deviation.

    The legend lists lines from the highest to the lowest at the longest length, and shorter lines
    last. A length that a run of a group refused, or with a value that is not finite, is left out of
    the line, because a mean over the other seeds would flatter. Lines leave the figure at the value
    `top`.
    """
    groups = sorted(groups, key=lambda group: -np.nan_to_num(group.values(metric)[:, -1].mean()))
    points = [
        Point(group.label, float(measurement.length), value)
        for group in groups
        for evaluation in group.evaluations
        for measurement in evaluation.measurements
        if (value := getattr(measurement, metric)) is not None
    ]
    points = _of_all_seeds(points, groups)
    with theme():
        figure, axes = _canvas("length of the window (tokens)", METRICS[metric])
        _lines(axes, points, groups)
        _length_axis(axes, groups[0].evaluations[0].lengths)
        shown = [point for point in points if top is None or point.y <= top]
        _value_axis(axes, shown)
        if top is not None and shown:
            lowest = min(point.y for point in shown)
            axes.set_ylim(lowest - MARGIN * (top - lowest), top)
        _mark_training(axes, groups)
    return figure


def over_context(groups: Sequence[Group]) -> "Figure":
    """Draw the mean loss of a token against the number of earlier tokens in the window.

    A bin of contexts comes from the longest window that scores the bin. Under `non_overlapping` the
    curve covers the longest window. Under `last` and `sliding` the curve joins the ends of all
    windows.
    """
    points = []
    for group in groups:
        for evaluation in group.evaluations:
            bins = {
                (first, last): loss
                for measurement in evaluation.measurements
                for first, last, loss in measurement.contexts
            }
            points += [
                Point(group.label, math.sqrt(first * last), loss)
                for (first, last), loss in bins.items()
            ]
    points = _of_all_seeds(points, groups)
    longest = max(groups[0].evaluations[0].lengths)
    powers = range(int(math.log2(longest)) + 1)
    with theme():
        figure, axes = _canvas("tokens of context", "loss (nats a token)")
        _lines(axes, points, groups, markers=False)
        _length_axis(axes, [2**power for power in powers])
        _value_axis(axes, points)
        _mark_training(axes, groups)
    return figure


def over_training(
    groups: Sequence[Group], histories: Mapping[str, Sequence[Mapping[str, Any]]]
) -> "Figure":
    """Draw the training loss against the tokens seen; `histories` holds the metrics by run."""
    from matplotlib.ticker import EngFormatter

    points = [
        Point(group.label, float(step["tokens"]), step["loss"])
        for group in groups
        for evaluation in group.evaluations
        for step in histories.get(evaluation.subject.run, ())
        if "loss" in step
    ]
    with theme():
        figure, axes = _canvas("tokens trained on", "training loss (nats a token)")
        _lines(axes, points, groups, markers=False)
        axes.xaxis.set_major_formatter(EngFormatter())
        _value_axis(axes, points)
    return figure


def _of_all_seeds(points: Sequence[Point], groups: Sequence[Group]) -> list[Point]:
    """Return the points of a label and an x at which all runs of the group have a finite value."""
    finite = Counter((point.label, point.x) for point in points if math.isfinite(point.y))
    runs = {group.label: len(group.evaluations) for group in groups}
    return [point for point in points if finite[point.label, point.x] == runs[point.label]]


def _canvas(x: str, y: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _lines(
    axes: "Axes", points: Sequence[Point], groups: Sequence[Group], **options: object
) -> None:
    import seaborn

    if not points:
        return  # every length was refused: seaborn warns of colours without points
    labels = [group.label for group in groups]
    seaborn.lineplot(
        x=[point.x for point in points],
        y=[point.y if math.isfinite(point.y) else math.nan for point in points],
        hue=[point.label for point in points],
        style=[point.label for point in points],
        hue_order=labels,
        style_order=labels,
        errorbar="sd",
        ax=axes,
        **{**looks({group.label: group.scheme for group in groups}), **options},
    )
    seaborn.move_legend(axes, "center left", bbox_to_anchor=(1.01, 0.5), title=None)
    for text in axes.get_legend().get_texts():  # type: ignore[union-attr]
        text.set_parse_math(False)  # a name may have a dollar sign
        text.set_text(textwrap.fill(text.get_text(), LABEL))


def _length_axis(axes: "Axes", ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    axes.minorticks_off()


def _value_axis(axes: "Axes", points: Sequence[Point]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    finite = [point.y for point in points if math.isfinite(point.y)]
    if finite and max(finite) > LOG_RATIO * min(finite):
        axes.set_yscale("log")
        within = max(finite) < 10 * min(finite)
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8) if within else (1, 2, 5))
        )
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_locator(NullLocator())


def _mark_training(axes: "Axes", groups: Sequence[Group]) -> None:
    lengths = sorted({group.train_length for group in groups if group.train_length})
    for length in lengths:
        axes.axvline(length, color=ACCENT, linewidth=1, linestyle=":", zorder=1)
        axes.annotate(
            f"trained at {length:,}" if length == lengths[0] else f"{length:,}",
            (length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right" if length == lengths[0] < lengths[-1] else "center",
            color=ACCENT,
        )
