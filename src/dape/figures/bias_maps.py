"""Maps of encodings: lines over the distance of two positions, and matrices."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dape.figures.style import ACCENT, looks, theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

DISTANCE = "distance $i - j$ (tokens)"
STEEP = 30  # larger values get a logarithmic axis, because a softmax hardly distinguishes them
HEIGHT, LINES_ASPECT = 2.1, 1.6  # of panels, in inches, and of lines; maps are square
CAPTION = 18  # characters to an inch
TICKS = 6  # on an axis of distances, at most
WIDE = 10_000  # from here on a map has room for half the numbers below it


@dataclass(frozen=True, slots=True)
class Map:
    """Values [y, x] shown as colours; `x` and `y` hold name and coordinates of an axis.

    A matrix is masked where j > i, with the legend in the masked corner. Other maps are waves.
    """

    title: str
    values: np.ndarray
    x: tuple[str, np.ndarray]
    y: tuple[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a figure: lines over the distances 0, 1, .., and maps on the right."""

    label: str
    lines: dict[str, np.ndarray]
    maps: list[Map]
    by_head: bool = False


def draw(rows: Sequence[Row], title: str, caption: str, mark: int | None = None) -> "Figure":
    """Draw rows with equally many maps; `mark` is the training length, marked as a distance."""
    from matplotlib.figure import Figure

    count = len(rows[0].maps)
    width = HEIGHT * (LINES_ASPECT + count) + 0.4 * (2 + count)
    ratios = [LINES_ASPECT, *[1.0] * count]
    lines = textwrap.wrap(caption, int(CAPTION * width), break_on_hyphens=False)
    height = (HEIGHT + 0.6) * len(rows) + 0.4 + 0.15 * len(lines)
    with theme():
        figure = Figure(figsize=(width, height), layout="compressed")
        grid = figure.subplots(len(rows), 1 + count, squeeze=False, width_ratios=ratios)
        for row, (first, *panels) in zip(rows, grid, strict=True):
            _lines(first, row, mark)
            known = ""
            for panel, each in zip(panels, row.maps, strict=True):
                _map(panel, each, label_y=each.y[0] != known)
                known = each.y[0]
        for panel in grid[:-1].flat:
            panel.set_xlabel("")
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize="small", color=ACCENT)
    return figure


def _lines(axes: "Axes", row: Row, mark: int | None) -> None:
    colours = _heads(axes, row) if row.by_head else looks({x: x for x in row.lines})["palette"]
    for label, values in row.lines.items():
        axes.plot(np.arange(len(values)), values, color=colours[label], label=label, linewidth=1.3)
    axes.set_ylabel(row.label)
    value_axis(axes, [*row.lines.values()])
    axes.set_box_aspect(1 / LINES_ASPECT)
    longest = max(len(values) for values in row.lines.values())
    _distances(axes, longest)
    if len(row.lines) > 1 and not row.by_head:
        axes.legend(handlelength=1.5)
    if mark is not None and mark < longest:
        axes.axvline(mark, color=ACCENT, linewidth=1, linestyle=":", zorder=1)
        above = axes.get_xaxis_transform()
        axes.text(mark, 1.02, f"$L$ = {mark:,}", transform=above, ha="center", color=ACCENT)


def _heads(axes: "Axes", row: Row) -> dict[str, tuple[float, ...]]:
    """Return a colour for each line, of a scale drawn beside the lines."""
    import seaborn
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(row.lines)
    colours = seaborn.color_palette("viridis", count)
    norm = BoundaryNorm(np.arange(count + 1) + 0.5, count)
    place = axes.inset_axes((1.02, 0, 0.025, 1))
    bar = axes.figure.colorbar(ScalarMappable(norm, ListedColormap(colours)), cax=place)
    bar.outline.set_visible(False)
    bar.set_ticks(range(1, count + 1, math.ceil(count / 12)))
    place.tick_params(size=0, labelsize="x-small")
    place.set_title("head", fontsize="x-small")
    return dict(zip(row.lines, colours, strict=True))


def _map(axes: "Axes", each: Map, label_y: bool) -> None:
    (x_name, x), (y_name, y) = each.x, each.y
    matrix = np.ma.isMaskedArray(each.values)
    mesh = axes.pcolormesh(
        _edges(x), _edges(y), each.values, cmap="viridis" if matrix else "RdBu_r", rasterized=True
    )
    if not matrix:
        reach = np.abs(each.values).max()
        mesh.set_clim(-reach, reach)
    axes.grid(False)
    axes.set_box_aspect(1)
    axes.invert_yaxis()
    axes.locator_params(integer=True, nbins=5)
    if len(y) == 1:
        axes.set_yticks(y)
    if x[-1] >= WIDE:
        axes.locator_params("x", integer=True, nbins=3)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_title(each.title, fontsize="medium")
    axes.set(xlabel=x_name, ylabel=y_name if label_y else "")
    axes.tick_params(labelleft=label_y)
    if x_name == DISTANCE:
        _distances(axes, len(x), TICKS if x[-1] < WIDE else 4)
    _legend(axes, mesh, matrix)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Return the borders of cells around their centres; a cell alone has the width 1."""
    steps = np.diff(centres) if len(centres) > 1 else np.ones(1)
    first, last = centres[0] - steps[0] / 2, centres[-1] + steps[-1] / 2
    return np.array([first, *(centres[1:] + centres[:-1]) / 2, last])


def _legend(axes: "Axes", mesh: "QuadMesh", matrix: bool) -> None:
    """Draw the scale of colours: within a matrix, or beside the map."""
    low, high = mesh.get_clim()
    place = axes.inset_axes((0.5, 0.93, 0.44, 0.04) if matrix else (1.03, 0, 0.04, 1))
    bar = axes.figure.colorbar(mesh, cax=place, orientation="horizontal" if matrix else "vertical")
    ticks = [low, high] if matrix else [low, 0.0, high]
    bar.set_ticks(ticks, labels=[_short(tick) for tick in ticks])
    bar.outline.set_visible(False)
    place.tick_params(size=2, labelsize="x-small")


def _short(value: float) -> str:
    """Return a number with two significant digits."""
    from matplotlib.ticker import Formatter

    return Formatter.fix_minus(f"{float(f'{value:.2g}') + 0:,g}")  # + 0: no minus before zero


def value_axis(axes: "Axes", lines: Sequence[np.ndarray]) -> None:
    """Make the y axis logarithmic on both sides of [-1, 1] if values are large."""
    low, high = min(line.min() for line in lines), max(line.max() for line in lines)
    if max(-low, high) <= STEEP:
        return
    low, high = 1.3 * min(low, -0.2), 1.3 * max(high, 0.2)
    powers = [10.0**power for power in range(int(math.log10(max(-low, high))) + 1)]
    ticks = sorted(tick for x in (0.0, *powers) for tick in {-x, x} if low <= tick <= high)
    axes.set_yscale("asinh")
    axes.set_yticks(ticks, labels=[_short(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)


def _distances(axes: "Axes", length: int, most: int = TICKS) -> None:
    """Make the x axis linear up to 1, then logarithmic, with ticks at powers of two."""
    axes.set_xscale("symlog", base=2, linthresh=1)
    powers = np.arange(int(np.log2(length)) + 1)
    ticks = [0, *(2 ** powers[:: math.ceil(len(powers) / most)]).tolist()]
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0, length)
    axes.set_xlabel(DISTANCE)
