"""`dape plot retrieval`: hidden numbers over depth and length, as a heat map or a table."""

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
    """Draw results of `dape eval retrieval` over depth and length, a panel per scheme.

    Runs that differ only in the seed share a panel with the mean.
    """

    runs: Runs
    """run folders measured by `dape eval retrieval`"""
    out: Path
    """file to write: a heat map (.png, .pdf, .svg) or the table (.md)"""
    task: Literal["passkey", "needle"] = "passkey"
    """task to draw"""
    metric: Literal["exact", "accuracy", "rank", "log_probability"] = "exact"
    """whole numbers, tokens, mean rank of a token, or log-probability of a number"""

    def __post_init__(self) -> None:
        """Refuse unknown formats, and an empty list of runs."""
        if not self.runs:
            raise UserError("no run given: dape plot retrieval RUN... --out FILE")
        check_out(self.out, formats=FORMATS)


def main(argv: list[str]) -> None:
    """Write the file and print its path."""
    arguments = parse(Arguments, argv, prog="dape plot retrieval")
    from dape.cli.progress import note_repeats
    from dape.evaluate.retrieval import load
    from dape.figures.retrieval import heat_map, table
    from dape.runs import RunFolder

    records = [load(RunFolder(run).retrieval(arguments.task)) for run in arguments.runs]
    note_repeats(records)
    write(
        arguments.out,
        lambda: heat_map(records, arguments.metric),
        md=lambda: table(records, arguments.metric).markdown() + "\n",
    )
