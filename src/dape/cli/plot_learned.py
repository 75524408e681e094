"""`dape plot learned`: A, B and f(A, B) of a trained model, as a figure, a table or a record."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dape.cli.arguments import parse
from dape.cli.options import Layers, check_out
from dape.cli.output import FIGURES, write
from dape.errors import UserError
from dape.strict import default

if TYPE_CHECKING:
    from dape.evaluate.learned import LearnedRows

FORMATS = (*FIGURES, ".md", ".json")


@dataclass(frozen=True, slots=True)
class Arguments:
    """Draw A, B and f(A, B) of a trained model for a query, by head.

    The table (.md) names heads local or anti-local by a number. A record (.json) holds all values,
    and can be drawn again without the model.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """run folder, DAPE model, or record (.json) of `dape plot learned`"""
    out: tuple[Path, ...]
    """files to write: figure (.png, .pdf, .svg), table (.md), record (.json)"""
    layers: Annotated[Layers, default("the first, the middle and the last")] = ()
    """layers, as 0,5,11, counted from 0"""
    length: int = 2048
    """tokens to read, from the beginning of the document"""
    query: Annotated[int | None, default("the last", "INT")] = None
    """query to draw, a token counted from 0"""
    document: Annotated[int | None, default("the first long enough", "INT")] = None
    """number of the document in the split"""
    split: Literal["test", "validation", "train"] = "test"
    """split of the corpus"""
    data: Annotated[Path | None, default("the corpus of the training", "PATH")] = None
    """prepared corpus"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto prefers a GPU"""

    def __post_init__(self) -> None:
        """Refuse an absent file, unknown formats, and a query without an earlier key."""
        if not self.out:
            raise UserError("no file given: dape plot learned RUN --out FILE")
        check_out(*self.out, formats=FORMATS)
        if self.length < 2:
            raise UserError(f"--length {self.length}: must be at least 2, a query and a key before")
        if self.query is not None and not 1 <= self.query < self.length:
            raise UserError(f"--query {self.query}: must be from 1 to {self.length - 1}")


def main(argv: list[str]) -> None:
    """Write the files and print their paths."""
    arguments = parse(Arguments, argv, prog="dape plot learned")
    from dape.evaluate.learned import load

    if arguments.run.suffix == ".json":
        _check_unused(arguments)
    record = load(arguments.run) if arguments.run.suffix == ".json" else made(arguments, argv)
    from dape.figures.learned import draw, table

    for file in arguments.out:
        write(file, lambda: draw(record), record, md=lambda: table(record).markdown() + "\n")


def _check_unused(arguments: Arguments) -> None:
    """Raise a `UserError` for an option of the computation, which a record has behind it."""
    for field in fields(Arguments):
        if field.name not in ("run", "out") and getattr(arguments, field.name) != field.default:
            raise UserError(
                f"--{field.name}: the record {arguments.run} is drawn as it is; leave the option"
                " out, or give the run in place of the record"
            )


def made(arguments: Arguments, argv: list[str]) -> "LearnedRows":
    """Return the record of the run's model."""
    from transformers.utils import logging

    from dape.device import choose_device
    from dape.evaluate.learned import learned_rows
    from dape.evaluate.opening import open_model
    from dape.provenance import provenance

    logging.disable_progress_bar()  # progress bars of loading
    device = choose_device(arguments.device)
    model = open_model(arguments.run)
    return learned_rows(
        model,
        model.corpus(arguments.data),
        layers=arguments.layers,
        length=arguments.length,
        query=arguments.query,
        document=arguments.document,
        split=arguments.split,
        device=device,
        provenance=provenance(device, ["plot", "learned", *argv]),
    )
