"""`dape plot context`: what `dape eval context` measured, as a figure or as tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from dape.cli.arguments import parse
from dape.errors import UserError

FORMATS = (".png", ".pdf", ".svg", ".md")


@dataclass(frozen=True, slots=True)
class Arguments:
    """Draw what longer windows gain, and adapters, by where a token occurred last.

    Runs that differ in nothing but their seed are averaged. A scheme with an adapter is compared
    with the same encoding without.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders that `dape eval context` was run on"""
    out: Path
    """file to write: a figure (.png, .pdf, .svg) or the tables (.md)"""
    split: Literal["test", "validation", "train"] = "test"
    """split of the evaluation"""

    def __post_init__(self) -> None:
        """Refuse formats nobody draws, and no runs."""
        if not self.runs:
            raise UserError("no run given: dape plot context RUN... --out FILE")
        if self.out.suffix not in FORMATS:
            raise UserError(f"--out {self.out}: its name must end in {', '.join(FORMATS)}")


def main(argv: list[str]) -> None:
    """Write the file and say where it is."""
    arguments = parse(Arguments, argv, prog="dape plot context")
    from dape.evaluate.context import context_path, load
    from dape.figures.context import draw, tables
    from dape.figures.style import save

    records = [load(context_path(run, arguments.split)) for run in arguments.runs]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.suffix == ".md":
        text = "\n\n".join(table.markdown() for table in tables(records))
        arguments.out.write_text(text + "\n", encoding="utf-8")
    else:
        save(draw(records), arguments.out)
    print(f"wrote {arguments.out}")
