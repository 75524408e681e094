"""Speed and memory of attention, measured by `dape bench attention`: tables and a figure."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from dape.bench.case import DIRECTIONS, YARDSTICK
from dape.bench.methods import METHODS
from dape.bench.record import FAILED, NOT_SERVED, OUT_OF_MEMORY, Entry, Results
from dape.figures.style import palette, theme
from dape.figures.tables import NOTHING, Table
from dape.provenance import INSTALLED, Provenance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
SHORT = {NOT_SERVED: NOTHING, OUT_OF_MEMORY: "OOM", FAILED: "failed"}


def page(results: Results, figure: str) -> str:
    """Return the tables in Markdown, with the figure and the origin of the numbers."""
    parts = ["# Speed and memory of attention", explanation(results), f"![]({figure})"]
    parts += [each.markdown() for each in tables(results)]
    return "\n\n".join([*parts, origin(results.provenance, results.seed)]) + "\n"


def origin(made: Provenance, seed: int) -> str:
    """Return the origin of numbers: command, commit, seed, device, versions and time."""
    return f"`{made['command']}` {conditions(made, seed)}; {made['time']}"


def conditions(made: Provenance, seed: int) -> str:
    """Return the commit, seed, device and versions of a measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return f"at {made['commit'] or f'an {INSTALLED}'}, seed {seed}; {made['device']}; {versions}"


def explanation(results: Results) -> str:
    """Return the explanation of the columns."""
    plain = ", ".join(name for name in results.methods if METHODS[name].plain)
    return (
        "Milliseconds of a call, the median, and their ratio to those of PyTorch's attention "
        f"(`{YARDSTICK}`, which chose {results.yardstick} here). {plain} leave bias and adapter "
        "out. Backward means the gradients of q, k, v and of every parameter of bias and adapter. "
        "The peak is what a call needs beyond its inputs, results included. Every method was "
        "checked against float64, output and gradients, before any was timed."
    )


def tables(results: Results) -> list[Table]:
    """Return a table per length."""
    return [table(results, length) for length in results.lengths]


def table(results: Results, length: int) -> Table:
    """Return a row per method: milliseconds, ratios to the yardstick, and peaks."""
    rows = []
    for method in results.methods:
        pair = [results.entry(method, length, direction) for direction in DIRECTIONS]
        base = [results.entry(YARDSTICK, length, direction) for direction in DIRECTIONS]
        times = zip(map(milliseconds, pair), map(ratio, pair, base), strict=True)
        rows.append([method, *(cell for both in times for cell in both), *map(peak, pair)])
    timed = [entry for entry in results.entries if entry.length == length]
    batch = timed[0].batch
    header = [cell for name in DIRECTIONS for cell in (f"{name} (ms)", f"/ {YARDSTICK}")]
    return Table(
        title=f"{results.scheme}, {results.heads} heads of {results.head_dim}, {results.dtype}, "
        f"causal: {batch:,} x {length:,} tokens",
        header=["method", *header, *(f"peak {name} (MiB)" for name in DIRECTIONS)],
        rows=rows,
        note=" ".join(
            [
                *(checked(results, length), *clocks(results, length)),
                *(*eager(results, length), *gaps(results, length)),
                *unsteady((f"{e.method} {e.direction}", e) for e in timed),
            ]
        ),
    )


def milliseconds(entry: Entry | None) -> str:
    """Return the median, or a word for the reason of a missing median."""
    if entry is None:
        return ""
    if entry.missing is not None:
        return SHORT[entry.missing.kind]
    return NOTHING if entry.milliseconds is None else digits(entry.milliseconds)


def ratio(entry: Entry | None, base: Entry | None) -> str:
    """Return the ratio of the median to the yardstick's."""
    if entry is None or base is None or not entry.milliseconds or not base.milliseconds:
        return NOTHING
    return digits(entry.milliseconds / base.milliseconds)


def peak(entry: Entry | None) -> str:
    """Return the peak in MiB."""
    if entry is None or entry.peak is None:
        return NOTHING
    return f"{entry.peak / MIB:,.0f}" if entry.peak >= 10 * MIB else f"{entry.peak / MIB:.1f}"


def digits(value: float) -> str:
    """Return a number with three digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def checked(results: Results, length: int) -> str:
    """Return a sentence on the size of the checks."""
    check = next(check for check in results.checks if check.length == length)
    return f"Checked on {check.batch:,} x {check.checked:,} tokens."


def clocks(results: Results, length: int) -> list[str]:
    """Return a sentence per clock, with the timed methods."""
    timed = [(entry.clock, entry) for entry in results.entries if entry.length == length]
    return [f"By {clock}: {', '.join(names)}." for clock, names in grouped(timed).items() if clock]


def eager(results: Results, length: int) -> list[str]:
    """Return a sentence on time and launches of calls outside a CUDA graph."""
    found = [
        f"{entry.method} {entry.direction} {digits(entry.eager)} ms ({entry.launches} launches)"
        for entry in results.entries
        if entry.length == length and entry.eager is not None
    ]
    return [f"Eager, by the wall clock: {', '.join(found)}."] if found else []


def unsteady(entries: Iterable[tuple[str, Entry]]) -> list[str]:
    """Return a sentence on named times whose runs differ, as beside a second program."""
    found = ", ".join(
        f"{name} ({digits(span[0])} to {digits(span[1])} ms)"
        for name, entry in entries
        if (span := entry.unsteady)
    )
    why = "the median is more than 10 % above the fastest run, as beside a second program"
    return [f"Unsteady, {why}: {found}."] if found else []


def gaps(results: Results, length: int) -> list[str]:
    """Return a sentence per reason of missing numbers, with the methods."""
    missing = [
        (f"{SHORT[entry.missing.kind]} ({entry.missing.reason})", entry)
        for entry in results.entries
        if entry.length == length and entry.missing and entry.missing.kind != OUT_OF_MEMORY
    ]
    return [f"{reason}: {', '.join(names)}." for reason, names in grouped(missing).items()]


def grouped(entries: Sequence[tuple[str, Entry]]) -> dict[str, list[str]]:
    """Return the methods with the same text, as `cuda`, or `cuda forward` for a direction."""
    found: dict[str, dict[str, list[str]]] = {}
    for text, entry in entries:
        found.setdefault(text, {}).setdefault(entry.method, []).append(entry.direction)
    return {
        text: [
            name if len(directions) == len(DIRECTIONS) else f"{name} {directions[0]}"
            for name, directions in methods.items()
        ]
        for text, methods in found.items()
    }


def draw(results: Results) -> "Figure":
    """Draw milliseconds, forward and with backward, and the peak, against the length."""
    from matplotlib.figure import Figure

    measured = {entry.method for entry in results.entries if entry.milliseconds}
    names = [name for name in METHODS if name in measured]
    peaks = any(entry.peak for entry in results.entries)
    with theme():
        figure = Figure(figsize=(4.2 * (len(DIRECTIONS) + peaks), 3.6))
        panels = figure.subplots(1, len(DIRECTIONS) + peaks)
        for axes, direction in zip(panels, DIRECTIONS, strict=False):
            lines(axes, results, names, direction, lambda entry: entry.milliseconds)
            axes.set_ylabel(f"{direction} (ms)")
        if peaks:
            lines(panels[-1], results, names, DIRECTIONS[-1], in_mib)
            panels[-1].set_ylabel(f"peak, {DIRECTIONS[-1]} (MiB)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
        figure.suptitle(
            f"{results.scheme}, {results.heads} heads of {results.head_dim}, {results.dtype}, "
            f"{results.tokens:,} tokens a call; {results.provenance['device']}"
        )
    return figure


def in_mib(entry: Entry) -> float | None:
    """Return the peak of an entry in MiB."""
    return None if entry.peak is None else entry.peak / MIB


def lines(
    axes: "Axes",
    results: Results,
    names: Sequence[str],
    direction: str,
    value: Callable[[Entry], float | None],
) -> None:
    """Draw a line per method over the lengths with a value."""
    from matplotlib.ticker import LogLocator

    colours = dict(zip(METHODS, palette(), strict=False))
    for name in names:
        entries = [results.entry(name, length, direction) for length in results.lengths]
        values = [(entry and value(entry)) or math.nan for entry in entries]
        dash = "--" if METHODS[name].plain else "-"
        axes.plot(results.lengths, values, dash, marker="o", color=colours[name], label=name)
    axes.set_xlabel("length (tokens)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(results.lengths, labels=[f"{n:,}" for n in results.lengths], rotation=45)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
