"""`dape plot`: evaluated runs as a figure, a table or a report."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from dape.cli.arguments import parse
from dape.cli.options import Runs, check_out
from dape.cli.output import FIGURES, write
from dape.errors import UserError
from dape.strict import default

FORMATS = (*FIGURES, ".html", ".md")


@dataclass(frozen=True, slots=True)
class Arguments:
    """Draw a metric against the length of the window, from results of `dape eval`.

    Runs that differ only in the seed share a line, with the standard deviation as a shaded area.
    Dashed lines are schemes without an adapter.
    """

    runs: Runs
    """run folders measured by `dape eval`"""
    out: Path
    """file to write: figure (.png, .pdf, .svg), report (.html) or tables (.md)"""
    metric: Literal["perplexity", "bits_per_byte", "loss"] = "perplexity"
    """number to draw"""
    protocol: Literal["last", "sliding", "non_overlapping"] = "last"
    """protocol of the evaluation"""
    stride: Annotated[int | None, default("required by sliding", "INT")] = None
    """stride of the protocol sliding, in tokens"""
    split: Literal["test", "validation", "train"] = "test"
    """split of the evaluation"""

    def __post_init__(self) -> None:
        """Refuse unknown formats, and an empty list of runs."""
        if not self.runs:
            raise UserError("no run given: dape plot RUN... --out FILE")
        check_out(self.out, formats=FORMATS)


def main(argv: list[str]) -> None:
    """Write the file and print its path."""
    arguments = parse(Arguments, argv, prog="dape plot")
    from dape.cli.progress import note_repeats
    from dape.evaluate.compare import check_comparable, group
    from dape.evaluate.protocols import check_stride
    from dape.evaluate.record import load
    from dape.figures.curves import over_length
    from dape.figures.report import Report
    from dape.runs import RunFolder

    check_stride(arguments.protocol, arguments.stride)
    place = (arguments.protocol, arguments.stride, arguments.split)
    evaluations = [load(RunFolder(run).evaluation(*place)) for run in arguments.runs]
    note_repeats(evaluations)
    check_comparable(evaluations, arguments.metric)
    report = Report(group(evaluations), arguments.metric, shlex.join(["dape", "plot", *argv]))
    write(
        arguments.out,
        lambda: over_length(report.groups, report.metric),
        html=report.html,
        md=report.markdown,
    )
