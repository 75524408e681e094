"""`dape plot context`: results of `dape eval context` as a figure or as tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dape.cli.arguments import parse
from dape.cli.options import Runs, check_out
from dape.cli.output import FIGURES, write
from dape.errors import UserError

FORMATS = (*FIGURES, ".md")


@dataclass(frozen=True, slots=True)
class Arguments:
    """Draw the gain of longer windows, and of adapters, by the last occurrence of tokens.

    Runs that differ only in the seed are averaged. A scheme with an adapter is compared with the
    same encoding without an adapter.
    """

    runs: Runs
    """run folders measured by `dape eval context`"""
    out: Path
    """file to write: a figure (.png, .pdf, .svg) or the tables (.md)"""
    split: Literal["test", "validation", "train"] = "test"
    """split of the evaluation"""

    def __post_init__(self) -> None:
        """Refuse unknown formats, and an empty list of runs."""
        if not self.runs:
            raise UserError("no run given: dape plot context RUN... --out FILE")
        check_out(self.out, formats=FORMATS)


def main(argv: list[str]) -> None:
    """Write the file and print its path."""
    arguments = parse(Arguments, argv, prog="dape plot context")
    from dape.cli.progress import note_repeats
    from dape.evaluate.context import load
    from dape.figures.context import draw, tables
    from dape.runs import RunFolder

    records = [load(RunFolder(run).context(arguments.split)) for run in arguments.runs]
    note_repeats(records)
    write(
        arguments.out,
        lambda: draw(records),
        md=lambda: "\n\n".join(table.markdown() for table in tables(records)) + "\n",
    )
