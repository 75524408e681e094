"""A, B and f(A, B) of a trained model, as Figure 1 of Zheng et al., 2024, and as a table."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dape.chomsky.maps import Layer as MapLayer
from dape.evaluate.heads import DENSER, Head
from dape.evaluate.learned import Layer, LearnedRows
from dape.figures.bias_maps import value_axis
from dape.figures.style import ACCENT, theme
from dape.figures.tables import NOTHING, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (3.1, 2.0)  # inches
# Scales of colours by kind of head.
SCALES = {"local": "crest", "even": "Greys", "anti-local": "OrRd"}
POINTS = 64  # most points of a line of scores, because scores are noisy


def draw(record: LearnedRows) -> "Figure":
    """Draw A, B and f(A, B) against the position of the key: a row per layer, a line per head.

    Lines are means over spans of neighbouring keys.
    """
    from matplotlib.figure import Figure

    width, height = PANEL
    with theme():
        figure = Figure(figsize=(3 * width + 1.1, height * len(record.layers) + 0.9))
        grid = figure.subplots(len(record.layers), 3, squeeze=False, sharex=True)
        for axes, layer in zip(grid, record.layers, strict=True):
            titled = layer is record.layers[0]
            for panel, (name, values) in zip(axes, panels(layer).items(), strict=True):
                _lines(panel, *_coarser(record, values, name.startswith("scores")), layer.heads)
                panel.set_title(name if titled else "")
                panel.axvline(record.query - record.far, color=ACCENT, linewidth=1, linestyle=":")
            axes[0].set_ylabel(f"layer {layer.layer}")
            _legend(axes[-1], layer.heads)
        for panel in grid[-1]:
            panel.set_xlabel("position of the key")
            panel.xaxis.set_major_formatter("{x:,g}")
            panel.set_xlim(0, record.query)
        figure.suptitle(_title(record), x=0.01, ha="left", weight="bold")
        figure.supxlabel(note(record), x=0.01, ha="left", fontsize="small", color=ACCENT)
    return figure


def panels(layer: Layer | MapLayer) -> dict[str, np.ndarray]:
    """Return the lines [heads, keys] of a layer's panels, by title."""
    change = "f(A, B)" if layer.residual else "f(A, B), instead of B"
    return {
        "scores A": np.array(layer.scores),
        "bias B": np.array(layer.bias),
        f"adapter {change}": np.array(layer.change),
    }


def _coarser(record: LearnedRows, values: np.ndarray, noisy: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return positions of keys and lines to draw, with at most `POINTS` points for noisy lines."""
    edges = np.array(record.spans)
    first = np.arange(0, values.shape[1], _step(record) if noisy else 1)
    sums = np.add.reduceat(values * np.diff(edges), first, axis=1)
    edges = np.append(edges[first], edges[-1])
    return (edges[:-1] + edges[1:] - 1) / 2, sums / np.diff(edges)


def _step(record: LearnedRows) -> int:
    """Return the number of spans in a point of a noisy line."""
    return -(-(len(record.spans) - 1) // POINTS)


def _title(record: LearnedRows) -> str:
    """Return a title with model and query, counted from 0 as in `--query`."""
    return f"{record.subject.scheme}, query {record.query:,} of document {record.document}"


def note(record: LearnedRows) -> str:
    """Return the explanation of the lines."""
    span = (record.query + 1) / (len(record.spans) - 1)
    widths = (span * _step(record), span)
    mean = "; lines are means over neighbouring keys, {:.0f} of A and {:.0f} of B and f"
    border = (
        "length trained at" if record.far == record.subject.train_length else "half of the keys"
    )
    return (
        f"Left of the dotted line keys are far ({border}: {record.far:,} tokens)"
        f"{mean.format(*widths)}."
    )


def _lines(axes: "Axes", keys: np.ndarray, values: np.ndarray, heads: Sequence[Head]) -> None:
    for line, colour in zip(values, _colours(heads), strict=True):
        axes.plot(keys, line, color=colour, linewidth=1)
    value_axis(axes, list(values))


def _colours(heads: Sequence[Head]) -> list[tuple[float, ...]]:
    """Return a colour per head: a scale per kind, a shade per head."""
    import seaborn

    counts = Counter(head.kind for head in heads)
    shades = {
        kind: iter(seaborn.color_palette(SCALES[kind], count + 2)[2:])
        for kind, count in counts.items()
    }
    return [next(shades[head.kind]) for head in heads]


def _legend(axes: "Axes", heads: Sequence[Head]) -> None:
    """Name the heads by kind, in the darkest colour of the kind."""
    import seaborn

    words = [(kind, [str(head.head) for head in heads if head.kind == kind]) for kind in SCALES]
    for place, (kind, numbers) in enumerate(words):
        if numbers:
            axes.text(
                1.03,
                0.95 - 0.33 * place,
                f"{kind}\n" + textwrap.fill(", ".join(numbers), 14),
                transform=axes.transAxes,
                va="top",
                fontsize="small",
                color=seaborn.color_palette(SCALES[kind], 5)[3],
            )


def table(record: LearnedRows) -> Table:
    """Return the numbers by head."""
    keys_far = 1 - record.far / (record.query + 1)
    rows = [
        [
            f"{layer.layer}.{head.head}",
            head.kind,
            *map(_percent, (head.positive_far, head.change_far, head.attention_far)),
            f"{head.centre:,.1f}",
            *map(signed, (head.with_scores, head.with_bias)),
        ]
        for layer in record.layers
        for head in layer.heads
    ]
    kinds = Counter(head.kind for layer in record.layers for head in layer.heads)
    counted = ", ".join(f"{kinds[kind]} {kind}" for kind in SCALES)
    return Table(
        title=f"Heads of {_title(record)}",
        header=[
            *("layer.head", "kind", "positive logits - A, far", "positive f, far"),
            *("attention, far", "mean distance", "corr(f, A)", "corr(f, B)"),
        ],
        rows=rows,
        note=f"{len(rows)} heads: {counted}. Far keys are {record.far:,} tokens or more before the "
        f"query, {keys_far:.0%} of all. Positive: above the mean over the keys. A head is "
        f"anti-local if positive logits - A are {DENSER:g} times as dense on far keys as on near "
        "ones, local if the reverse holds.",
    )


def _percent(fraction: float | None) -> str:
    """Return a fraction in percent."""
    return NOTHING if fraction is None else f"{fraction:.0%}"


def signed(value: float | None) -> str:
    """Return a correlation with a sign."""
    return NOTHING if value is None else f"{value:+.2f}"
