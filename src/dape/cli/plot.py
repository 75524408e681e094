"""`dape plot`: evaluated runs as a figure, a table or a report."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from dape.cli.arguments import parse
from dape.errors import UserError

FORMATS = (".png", ".pdf", ".svg", ".html", ".md")


@dataclass(frozen=True, slots=True)
class Arguments:
    """Draw a metric against the length of the window, from what `dape eval` measured.

    The runs that differ in nothing but their seed are one line, with a band of one standard
    deviation. Dashed lines are schemes without an adapter.

    `dape plot encoding NAME` draws a position encoding instead, `dape plot retrieval RUN...` what
    `dape eval --retrieval` measured.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders that `dape eval` was run on"""
    out: Path
    """file to write: a figure (.png, .pdf, .svg), a report with all figures and tables (.html),
    or the tables (.md)"""
    metric: Literal["perplexity", "bits_per_byte", "loss"] = "perplexity"
    """what is drawn"""
    protocol: Literal["last", "sliding", "non_overlapping"] = "last"
    """protocol of the evaluation"""
    stride: int | None = None
    """stride of the sliding protocol"""
    split: Literal["test", "validation", "train"] = "test"
    """split of the evaluation"""

    def __post_init__(self) -> None:
        """Refuse formats nobody draws, and no runs."""
        if not self.runs:
            raise UserError("no run given: dape plot RUN... --out FILE")
        if self.out.suffix not in FORMATS:
            raise UserError(f"--out {self.out}: its name must end in {', '.join(FORMATS)}")


def main(argv: list[str]) -> None:
    """Write the file and say where it is."""
    if argv[:1] == ["encoding"]:
        from dape.cli import plot_encoding

        return plot_encoding.main(argv[1:])
    if argv[:1] == ["retrieval"]:
        from dape.cli import plot_retrieval

        return plot_retrieval.main(argv[1:])
    if argv[:1] == ["learned"]:
        from dape.cli import plot_learned

        return plot_learned.main(argv[1:])
    if argv[:1] == ["context"]:
        from dape.cli import plot_context

        return plot_context.main(argv[1:])
    arguments = parse(Arguments, argv, prog="dape plot")
    from dape.evaluate.compare import check_comparable, group
    from dape.evaluate.record import evaluation_path, load
    from dape.figures.curves import over_length
    from dape.figures.report import Report
    from dape.figures.style import save

    place = (arguments.protocol, arguments.stride, arguments.split)
    evaluations = [load(evaluation_path(run, *place)) for run in arguments.runs]
    check_comparable(evaluations, arguments.metric)
    report = Report(group(evaluations), arguments.metric, shlex.join(["dape", "plot", *argv]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.suffix == ".html":
        arguments.out.write_text(report.html(), encoding="utf-8")
    elif arguments.out.suffix == ".md":
        arguments.out.write_text(report.markdown(), encoding="utf-8")
    else:
        save(over_length(report.groups, report.metric), arguments.out)
    print(f"wrote {arguments.out}")
