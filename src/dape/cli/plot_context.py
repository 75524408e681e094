"""`dape plot context`: what `dape eval context` measured, as a figure or as tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from dape.cli.arguments import parse
from dape.cli.options import check_format
from dape.errors import UserError

FORMATS = (".png", ".pdf", ".svg", ".md")


@dataclass(frozen=True, slots=True)
class Arguments:
    """Draw what longer windows gain, and adapters, by where a token occurred last.

    Runs that differ in nothing but their seed are averaged. A scheme with an adapter is compared
    with the same encoding without.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders measured by `dape eval context`"""
    out: Path
    """file to write: a figure (.png, .pdf, .svg) or the tables (.md)"""
    split: Literal["test", "validation", "train"] = "test"
    """split of the evaluation"""

    def __post_init__(self) -> None:
        """Refuse formats nobody draws, and no runs."""
        if not self.runs:
            raise UserError("no run given: dape plot context RUN... --out FILE")
        check_format(self.out, FORMATS)


def main(argv: list[str]) -> None:
    """Write the file and say where it is."""
    arguments = parse(Arguments, argv, prog="dape plot context")
    from dape.cli.progress import note_repeats
    from dape.evaluate.context import load
    from dape.figures.context import draw, tables
    from dape.figures.style import save
    from dape.files import write_text
    from dape.runs import RunFolder

    place = ("context", None, arguments.split)
    records = [load(RunFolder(run).evaluation(*place)) for run in arguments.runs]
    note_repeats(records)
    if arguments.out.suffix == ".md":
        text = "\n\n".join(table.markdown() for table in tables(records))
        write_text(arguments.out, text + "\n")
    else:
        save(draw(records), arguments.out)
    print(f"wrote {arguments.out}")
