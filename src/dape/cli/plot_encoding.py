"""`dape plot encoding`: a position encoding as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dape.cli.arguments import parse
from dape.cli.options import check_format
from dape.figures.view import View

FORMATS = (".png", ".pdf", ".svg")


@dataclass(frozen=True, slots=True)
class Arguments:
    """Draw a position encoding: what it adds over distance, and its matrix.

    A bias is drawn for each head. Of a rotation the scores of ones are drawn, of an embedding the
    cosines between positions.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """scheme, such as kerple, dape-bias-kerple or yarn (`dape info schemes`)"""
    view: Annotated[View, tyro.conf.arg(name="")]
    out: Path | None = None
    """file to write (.png, .pdf, .svg); default NAME.png"""

    @property
    def file(self) -> Path:
        """Return where the picture goes."""
        return self.out or Path(f"{self.name}.png")

    def __post_init__(self) -> None:
        """Refuse formats nobody draws."""
        check_format(self.file, FORMATS)


def main(argv: list[str]) -> None:
    """Write the file and say where it is."""
    arguments = parse(Arguments, argv, prog="dape plot encoding")
    from dape.figures.encodings import draw
    from dape.figures.style import save

    figure = draw(arguments.name, arguments.view)
    save(figure, arguments.file)
    print(f"wrote {arguments.file}")
