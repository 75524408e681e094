"""A, B and f(A, B) of an encoder of the Chomsky benchmark, as a figure and a table."""

from typing import TYPE_CHECKING

import numpy as np

from dape.chomsky.maps import Map
from dape.figures.bias_maps import value_axis
from dape.figures.learned import panels, signed
from dape.figures.style import ACCENT, theme
from dape.figures.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = (2.5, 1.5)  # inches


def draw(made: Map) -> "Figure":
    """Draw A, B, f(A, B) and the weights over the tokens: a row per layer, a line per head.

    Placeholders are shaded; the dotted line is the query.
    """
    import seaborn
    from matplotlib.figure import Figure

    width, height = PANEL
    with theme():
        figure = Figure(figsize=(4 * width + 0.8, height * len(made.layers) + 0.9))
        grid = figure.subplots(len(made.layers), 4, squeeze=False, sharex=True)
        for number, (axes, layer) in enumerate(zip(grid, made.layers, strict=True)):
            shown = {**panels(layer), "attention": np.array(layer.weights)}
            for panel, (name, lines) in zip(axes, shown.items(), strict=True):
                colours = seaborn.color_palette("crest", len(lines))
                for line, colour in zip(lines, colours, strict=True):
                    panel.plot(line, color=colour, linewidth=1)
                panel.axvspan(made.inputs, len(lines[0]) - 1, color=ACCENT, alpha=0.12, linewidth=0)
                panel.axvline(made.query, color=ACCENT, linewidth=1, linestyle=":")
                panel.set_title(name if number == 0 else "")
                value_axis(panel, list(lines))
            axes[0].set_ylabel(f"layer {number}")
        for panel in grid[-1]:
            panel.set_xlabel("token")
            panel.set_xlim(0, len(made.layers[0].scores[0]) - 1)
        figure.suptitle(title(made), x=0.01, ha="left", weight="bold")
    return figure


def title(made: Map) -> str:
    """Return a title with model and input."""
    return f"{made.task}, {made.scheme}, seed {made.seed}: {made.length} symbols"


def table(made: Map) -> Table:
    """Return the variation of A, B and f over the input by layer, and the correlations of f."""
    rows = [
        [
            str(number),
            *(f"{layer.spread[name]:.3g}" for name in ("scores", "bias", "change")),
            *map(signed, (layer.with_scores, layer.with_bias)),
            f"{np.array(layer.weights)[:, : made.inputs].sum(1).mean():.0%}",
        ]
        for number, layer in enumerate(made.layers)
    ]
    return Table(
        title(made),
        [
            "layer",
            "sd of A",
            "sd of B",
            "sd of f",
            "corr(f, A)",
            "corr(f, B)",
            "attention on input",
        ],
        rows,
        note=f"Of the middle placeholder, means over heads and {made.examples} inputs of"
        f" {made.length} symbols; trained on up to {made.trained}. sd: standard deviation over the"
        " tokens of the input.",
    )
