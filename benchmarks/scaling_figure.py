"""The figure of `results/scaling`: how many times as fast as a single GPU several GPUs are.

    python benchmarks/scaling_figure.py [results/scaling/scaling.json]

Writes an SVG beside the record, with a panel for every part that several GPUs were measured on. A
line joins the numbers of GPUs of a model's size, or of a length.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import scaling

from dape.errors import UserError
from dape.figures.style import ACCENT, looks, save, theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "models": "training, 512 tokens",
    "attention": "attention, one sequence",
    "lengths": "a step, one sequence",
}
Line = tuple[str, str, list[int], list[float]]  # scheme, label, numbers of GPUs, times as fast


def lines(entries: Sequence[dict[str, Any]], part: str) -> list[Line]:
    """Return the lines of a part: tokens or sequences a second over those of a single GPU."""
    times: dict[tuple[str, str], dict[int, float]] = {}
    found = scaling.best(list(entries))
    for entry in found:
        case = entry["case"]
        one = scaling.beside(found, entry, gpus=1)
        if case["part"] == part and "failed" not in entry and one:
            label = case["size"] if part == "models" else f"{case['length']:,}"
            gain = scaling.work_of(entry) / scaling.work_of(one)
            times.setdefault((case["scheme"], label), {})[case["gpus"]] = gain
    return [
        (scheme, label, sorted(of), [of[gpus] for gpus in sorted(of)])
        for (scheme, label), of in times.items()
        if len(of) > 1
    ]


def draw(entries: Sequence[dict[str, Any]]) -> "Figure":
    """Return the figure.

    Raises:
        UserError: without results of a single GPU and of several, of the same commit and device.
    """
    from matplotlib.figure import Figure

    parts = {part: found for part in TITLES if (found := lines(entries, part))}
    if not parts:
        raise UserError(
            "no case was measured on a single GPU and on several at the same commit; run"
            " `python benchmarks/scaling.py --gpus 1,2 --again`"
        )
    with theme():
        figure = Figure(figsize=(3.4 * len(parts), 3.4))
        panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axes, (part, found) in zip(panels, parts.items(), strict=True):
            _panel(axes, TITLES[part], found)
        panels[0].set_ylabel("times as fast as a single GPU")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def _panel(axes: "Axes", title: str, found: Sequence[Line]) -> None:
    look = looks({scheme: scheme for scheme, *_ in found})
    most = max(max(gpus) for _, _, gpus, _ in found)
    ideal = {"color": ACCENT, "linestyle": ":", "linewidth": 1, "label": "N times for N GPUs"}
    axes.plot([1, most], [1, most], **ideal)
    named: set[str] = set()
    written: dict[str, float] = {}  # lines that end together share a label
    for scheme, label, gpus, times in found:
        axes.plot(
            gpus, times, color=look["palette"][scheme], marker=look["markers"][scheme],
            dashes=look["dashes"][scheme] or (1, 0), label="" if scheme in named else scheme,
        )  # fmt: skip
        named.add(scheme)
        if abs(written.get(label, 0.0) - times[-1]) > 0.2:
            end = gpus[-1], times[-1]
            axes.annotate(label, end, (5, 0), textcoords="offset points", va="center")
            written[label] = times[-1]
    ticks = sorted({number for _, _, gpus, _ in found for number in gpus})
    axes.set(title=title, xlabel="GPUs", xticks=ticks)
    axes.margins(x=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = scaling.ROOT / "results/scaling/scaling.json"
    parser.add_argument("record", type=Path, nargs="?", default=default)
    record = parser.parse_args().record
    try:
        save(draw(scaling.results(record)), record.with_suffix(".svg"))
    except UserError as error:
        sys.exit(f"error: {record}: {error}")
    print(f"wrote {record.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
