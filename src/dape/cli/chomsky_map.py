"""`dape chomsky map`: A, B and f(A, B) of a trained encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dape.cli.arguments import parse
from dape.cli.options import at_least_one, check_out
from dape.cli.output import FIGURES, write
from dape.errors import UserError

FORMATS = (*FIGURES, ".md", ".json")


@dataclass(frozen=True, slots=True)
class Arguments:
    """Show A, B and f(A, B) of a trained encoder, for the middle placeholder over all tokens.

    The record (.json) holds the lines of all heads, the figure draws them, and the table (.md) has
    the correlation of f(A, B) with A and with B.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """folder of a benchmark, written by `dape chomsky train`"""
    task: str
    """name of a task (`dape chomsky tasks`)"""
    scheme: str
    """scheme of the model"""
    out: tuple[Path, ...]
    """files to write: a figure (.png, .pdf, .svg), the table (.md), the record (.json)"""
    seed: int = 0
    """seed of the model"""
    length: int = 60
    """number of symbols of the input"""
    examples: int = 16
    """number of inputs in the mean"""

    def __post_init__(self) -> None:
        """Refuse an absent file, unknown formats, and counts below 1."""
        at_least_one(self, "length", "examples")
        if not self.out:
            raise UserError("no file given: dape chomsky map FOLDER ... --out FILE")
        check_out(*self.out, formats=FORMATS)


def main(argv: list[str]) -> None:
    """Write the files and print their paths."""
    arguments = parse(Arguments, argv, prog="dape chomsky map")
    from dape.chomsky.maps import make
    from dape.figures.chomsky_map import draw, table
    from dape.provenance import provenance

    made = make(
        arguments.folder,
        arguments.task,
        arguments.scheme,
        arguments.seed,
        length=arguments.length,
        examples=arguments.examples,
        provenance=provenance("cpu", ["chomsky", "map", *argv]),
    )
    for file in arguments.out:
        write(file, lambda: draw(made), made, md=lambda: table(made).markdown() + "\n")
