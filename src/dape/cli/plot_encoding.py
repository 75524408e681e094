"""`dape plot encoding`: a position encoding as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dape.cli.arguments import parse
from dape.cli.options import check_out
from dape.cli.output import FIGURES, write
from dape.figures.view import View
from dape.strict import default


@dataclass(frozen=True, slots=True)
class Arguments:
    """Draw a position encoding over distance, and as a matrix.

    The picture shows a bias by head, a rotation by the scores of vectors of ones, and an embedding
    by the cosines between positions.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """scheme, such as kerple, dape-bias-kerple or yarn (`dape info schemes`)"""
    view: Annotated[View, tyro.conf.arg(name="")]
    out: Annotated[Path | None, default("NAME.png", "PATH")] = None
    """file to write (.png, .pdf, .svg)"""

    @property
    def file(self) -> Path:
        """Return the path of the picture."""
        return self.out or Path(f"{self.name}.png")

    def __post_init__(self) -> None:
        """Refuse unknown formats."""
        check_out(self.file, formats=FIGURES)


def main(argv: list[str]) -> None:
    """Write the file and print its path."""
    arguments = parse(Arguments, argv, prog="dape plot encoding")
    from dape.figures.encodings import draw

    write(arguments.file, lambda: draw(arguments.name, arguments.view))
