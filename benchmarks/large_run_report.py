"""The table and the figure of the records of `benchmarks/large_run.py`.

    python benchmarks/large_run_report.py results/scaling/run-*.json [--out results/scaling/runs]

Writes a Markdown table with a column for each record, and an SVG with the losses. Phases that a
record lacks have empty cells.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dape.errors import UserError
from dape.figures.style import ACCENT, palette, save, theme
from dape.files import read_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]


def metrics(record: Record) -> list[Record]:
    """Return the metrics of all steps, of the last phase that has some."""
    found = [each["metrics"] for each in record["phases"].values() if "metrics" in each]
    return found[-1] if found else []


def column(record: Record) -> Iterator[tuple[str, str]]:
    """Yield the cells of a record, by the name of the row."""
    phases, rows = record["phases"], metrics(record)
    yield "GPUs", f"{record['gpus']} x {record['provenance']['device']}"
    if rows:
        yield "parameters", f"{phases['load']['parameters']:,}" if "load" in phases else ""
        yield "tokens a step", f"{rows[0]['tokens']:,}"
        yield "tokens/s, median", f"{median(each['tokens_per_second'] for each in rows):,.0f}"
        yield "MFU, median", _median_of(rows, "mfu", ".0%")
        for step in sorted({1, *range(50, len(rows), 50), len(rows)}):
            yield f"loss at step {step}", f"{rows[step - 1]['loss']:.3f}"
        for row in rows:
            if "validation_loss" in row:
                yield f"validation loss at step {row['step']}", f"{row['validation_loss']:.3f}"
    if "train" in phases:
        yield from _interruption(phases)
    for name, phase in phases.items():
        yield f"seconds: {name}", f"{phase['seconds']:.0f}"
    if "evaluate" in phases:
        for length, found in phases["evaluate"]["perplexity"].items():
            yield f"perplexity at {int(length):,}", f"{found:.2f}"


def _median_of(rows: Sequence[Record], name: str, form: str) -> str:
    found = [each[name] for each in rows if name in each]
    return format(median(found), form) if found else ""


def _interruption(phases: dict[str, Record]) -> Iterator[tuple[str, str]]:
    """Yield the cells on the checkpoint, the kill and the steps done twice."""
    first = phases["train"]
    saved, seconds = first["checkpoint"], [each["seconds"] for each in first["metrics"]]
    yield "checkpoint", f"step {saved}, {first['checkpoint_bytes'] / 1e9:.1f} GB"
    steps = median(after - before for before, after in pairwise(seconds))
    yield "seconds of the checkpoint", f"{seconds[saved] - seconds[saved - 1] - steps:.0f}"
    yield "seconds before step 1", f"{first['seconds'] - seconds[-1]:.0f}"
    yield "seconds of step 1", f"{seconds[0]:.0f}"
    yield "killed", f"after step {len(seconds)}, {first['processes']} processes"
    if "resume" in phases:
        second = phases["resume"]
        losses = [row["loss"] for row in second["repeated"]]
        apart = max((abs(before / after - 1) for before, after in losses), default=0.0)
        equal = f"{len(second['differing'])} differ, losses by at most {apart:.0e}"
        if not second["differing"]:
            equal = "all equal bit for bit"
        yield "steps done twice", f"{len(losses)}, {equal}"


def table(records: Sequence[Record]) -> str:
    """Return the Markdown table, with a column for each record."""
    columns = [dict(column(each)) for each in records]
    names = dict.fromkeys(name for each in columns for name in each)
    titles = [f"{each['recipe']}, {each['scheme']}" for each in records]
    lines = [f"| | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(records)}"]
    for name in names:
        lines.append(f"| {name} | {' | '.join(each.get(name, '') for each in columns)} |")
    return "\n".join(lines) + "\n"


def draw(records: Sequence[Record]) -> "Figure":
    """Return the figure: loss over steps, with validation as points and kills as lines."""
    from matplotlib.figure import Figure

    with theme():
        figure = Figure(figsize=(6.4, 3.6))
        axes = figure.subplots()
        for record, colour in zip(records, palette(), strict=False):
            rows = metrics(record)
            label = f"{record['recipe']}, {record['scheme']}"
            losses = [each["loss"] for each in rows]
            axes.plot([each["step"] for each in rows], losses, color=colour, label=label)
            held = [each for each in rows if "validation_loss" in each]
            axes.plot(
                [each["step"] for each in held], [each["validation_loss"] for each in held], "o",
                color=colour, markeredgecolor="white",
            )  # fmt: skip
            if "resume" in record["phases"]:
                axes.axvline(record["phases"]["resume"]["from"], color=ACCENT, linestyle=":")
        axes.set(xlabel="step", ylabel="loss, nats a token")
        axes.legend()
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("results/scaling/runs"))
    arguments = parser.parse_args(argv)
    try:
        remedy = "give records of large_run.py"
        records = [read_json(each, dict, remedy) for each in arguments.records]
    except UserError as error:
        sys.exit(f"error: {error}")
    write_text(arguments.out.with_name(arguments.out.name + ".md"), table(records))
    save(draw(records), arguments.out.with_name(arguments.out.name + ".svg"))
    print(table(records), end="")


if __name__ == "__main__":
    main()
