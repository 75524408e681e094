"""The use of the context: gains by the last occurrence of tokens, as a figure and tables."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dape.evaluate.compare import gather
from dape.evaluate.context import OCCURRENCES, ContextUse
from dape.evaluate.gains import Contrast, Gain, by_adapter, by_length, check_comparable
from dape.figures.style import ACCENT, looks, theme
from dape.figures.tables import NOTHING, Table
from dape.text import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (4.0, 2.7)  # inches
Styles = Mapping[str, Mapping[str, Any]]  # the result of `looks`
SPREAD = 0.5  # fraction of the distance between two bins to spread marks over


def tables(records: Sequence[ContextUse]) -> list[Table]:
    """Return the gains of longer windows, and of adapters with a baseline, by bin."""
    check_comparable(records)
    found = []
    for name, contrasts in _comparisons(records).items():
        for occurrence, each in contrasts.items():
            found.append(_table(records, f"{name}, nats a token", occurrence, each))
    return found


def _comparisons(records: Sequence[ContextUse]) -> dict[str, dict[str, list[Contrast]]]:
    """Return the contrasts by name, and by the kind of occurrence."""
    shortest, *_, longest = records[0].lengths
    found = {
        f"Gain of windows of {longest:,} tokens over {shortest:,}": {
            each: by_length(records, each) for each in OCCURRENCES
        },
        f"Gain of the adapter in windows of {longest:,} tokens": {
            each: by_adapter(records, each) for each in OCCURRENCES
        },
    }
    return {name: each for name, each in found.items() if each["token"]}


def _bins(lengths: Sequence[int]) -> list[str]:
    """Return the names of the bins, by the place of a token's last occurrence."""
    between = [f"{shorter:,} to {longer:,}" for shorter, longer in pairwise(lengths)]
    return [f"within {lengths[0]:,}", *between, "nowhere"]


def _table(
    records: Sequence[ContextUse], title: str, occurrence: str, contrasts: Sequence[Contrast]
) -> Table:
    targets = records[0].targets
    names = [*_bins(records[0].lengths), "all"]
    columns = [[*each.gains, each.total] for each in contrasts]
    rows = [
        [name, f"{gains[0].tokens:,}", *map(_cell, gains)]
        for name, gains in zip(names, zip(*columns, strict=True), strict=True)
    ]
    return Table(
        title=f"{title}, by the last occurrence of {OCCURRENCES[occurrence]}",
        header=["last occurrence", "tokens", *(each.name for each in contrasts)],
        rows=rows,
        note=f"A row holds the tokens whose last occurrence lies in a window of the longer length "
        f"and in none of the shorter. The last {targets.block:,} tokens of each window, of "
        f"{counted(len(targets.documents), 'document')} of the {targets.split} split. In brackets "
        "the 95 % interval, by the bootstrap over documents.",
    )


def _cell(gain: Gain) -> str:
    """Return a gain with interval, as `+0.123 [+0.100, +0.150]`."""
    if gain.mean is None:
        return NOTHING
    interval = "" if gain.low is None else f" [{gain.low:+.3f}, {gain.high:+.3f}]"
    return f"{gain.mean:+.3f}{interval}"


def draw(records: Sequence[ContextUse]) -> "Figure":
    """Draw the losses by position, and the gains by bin with intervals."""
    from matplotlib.figure import Figure

    check_comparable(records)
    rows = _comparisons(records)
    width, height = PANEL
    schemes = {label: each[0].subject.scheme for label, each in gather(records).items()}
    styles = looks(schemes)
    with theme():
        figure = Figure(figsize=(3 * width, height * len(rows) + 0.3))
        grid = figure.subplots(len(rows), 3, squeeze=False)
        _positions(grid[0, 0], records, styles)
        for axes in grid[1:, 0]:
            _adapters(axes, records, styles)
        for (name, contrasts), (_, *panels) in zip(rows.items(), grid, strict=True):
            for axes, (occurrence, each) in zip(panels, contrasts.items(), strict=True):
                _gains(axes, records[0].lengths, each, styles)
                axes.set_xlabel(
                    f"window that holds the last occurrence of\n{OCCURRENCES[occurrence]}"
                )
            panels[0].set_title(name, loc="left", fontsize="medium")
            panels[0].set_ylabel("gain (nats a token)")
    return figure


def _positions(axes: "Axes", records: Sequence[ContextUse], styles: Styles) -> None:
    """Draw the loss against the number of earlier tokens, in the longest window."""
    for label, members in gather(records).items():
        means = np.mean([[loss for *_, loss in each.positions] for each in members], axis=0)
        dashes = styles["dashes"][label] or (None, None)
        middles = [math.sqrt(first * last) for first, last, _ in members[0].positions]
        axes.plot(middles, means, label=label, **_style(styles, label), dashes=dashes)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,g}")
    length = records[0].lengths[-1]
    axes.set(xlabel=f"position in windows of {length:,} tokens", ylabel="loss (nats a token)")
    axes.legend()


def _adapters(axes: "Axes", records: Sequence[ContextUse], styles: Styles) -> None:
    """Draw the gain of adapters over all scored tokens, against the length of the window."""
    lengths = records[0].lengths
    columns = [by_adapter(records, "token", length) for length in lengths]
    for offset, contrasts in zip(
        _offsets(len(columns[0])), zip(*columns, strict=True), strict=True
    ):
        totals = [each.total for each in contrasts]
        _marks(axes, np.array(lengths) * 2**offset, totals, contrasts[0], styles)
    axes.axhline(0, color=ACCENT, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, labels=[f"{length:,}" for length in lengths], fontsize="small")
    axes.minorticks_off()
    axes.set(xlabel="length of the window (tokens)", ylabel="gain (nats a token)")
    axes.set_title("Gain of the adapter on all tokens", loc="left", fontsize="medium")
    axes.legend(fontsize="small", handlelength=1)


def _gains(
    axes: "Axes",
    lengths: Sequence[int],
    contrasts: Sequence[Contrast],
    styles: Styles,
) -> None:
    """Draw the gains of contrasts by bin, with the number of tokens."""
    for offset, each in zip(_offsets(len(contrasts)), contrasts, strict=True):
        _marks(axes, np.arange(len(each.gains)) + offset, each.gains, each, styles)
    names = [*(f"{length:,}" for length in lengths), "none"]
    labels = [
        f"{name}\n({gain.tokens:,})" for name, gain in zip(names, contrasts[0].gains, strict=True)
    ]
    axes.set_xticks(np.arange(len(names)), labels=labels, fontsize="x-small")
    axes.axhline(0, color=ACCENT, linewidth=1)
    axes.grid(axis="x", visible=False)


def _offsets(count: int) -> np.ndarray:
    """Return the shifts of `number` marks from the middle of a bin."""
    return SPREAD * ((np.arange(count) + 0.5) / count - 0.5)


def _marks(
    axes: "Axes", x: np.ndarray, gains: Sequence[Gain], contrast: Contrast, styles: Styles
) -> None:
    """Draw gains as points with intervals, in the looks of the scheme."""
    means, low, high = np.array([[g.mean, g.low, g.high] for g in gains], dtype=float).T
    style = _style(styles, contrast.label)
    axes.vlines(x, low, high, colors=style["color"], linewidth=1.3)
    axes.plot(x, means, linestyle="none", label=contrast.name, **style)


def _style(styles: Styles, label: str) -> dict[str, Any]:
    """Return colour and marker of a label; the marker is hollow for a scheme without an adapter."""
    colour = styles["palette"][label]
    return {
        "color": colour,
        "marker": styles["markers"][label],
        "markersize": 4,
        "markerfacecolor": "white" if styles["dashes"][label] else colour,
    }
