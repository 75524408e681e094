"""`dape explore`: encodings with sliders, and a model on a text, as a page for a browser."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dape.cli.arguments import parse
from dape.cli.options import Layers, check_out
from dape.errors import UserError
from dape.strict import default

if TYPE_CHECKING:
    from dape.evaluate.passage import Passage


@dataclass(frozen=True, slots=True)
class Arguments:
    """Write a page for a browser with every bias, and sliders for parameters.

    With a run or a DAPE model, the page also shows scores A, bias B, f(A, B) and attention over a
    text, for every layer, head and query. The page needs no network.
    """

    run: Annotated[
        tyro.conf.Positional[Path | None], default("encodings without a model", "[RUN]")
    ] = None
    """run folder or DAPE model"""
    out: Path = Path("explore.html")
    """page to write"""
    layers: Annotated[Layers, default("all")] = ()
    """layers of the model, as 0,5,11, counted from 0"""
    length: int = 128
    """tokens for the model to read; the page grows with the square"""
    text: Annotated[str | None, default("a document of the corpus", "STR")] = None
    """text for the model to read"""
    document: Annotated[int | None, default("the first long enough", "INT")] = None
    """number of the document in the split"""
    split: Literal["test", "validation", "train"] = "test"
    """split of the corpus"""
    data: Annotated[Path | None, default("the corpus of the training", "PATH")] = None
    """prepared corpus"""
    heads: int = 12
    """number of heads of the encodings"""
    train_length: int = 512
    """training length of the encodings, in tokens"""
    seed: int = 0
    """seed of the parameters at the start"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto prefers a GPU"""

    def __post_init__(self) -> None:
        """Refuse unknown formats, a single token, and two sources of text."""
        check_out(self.out, formats=(".html",))
        if self.length < 2:
            raise UserError(f"--length {self.length}: must be at least 2, a query and a key before")
        if self.text is not None and self.document is not None:
            raise UserError("--text and --document are both given; leave out --text or --document")


def main(argv: list[str]) -> None:
    """Write the page and print its path."""
    arguments = parse(Arguments, argv, prog="dape explore")
    from dape.device import choose_device
    from dape.figures.explore import page
    from dape.figures.view import View
    from dape.files import write_text
    from dape.provenance import INSTALLED, provenance

    view = View(heads=arguments.heads, train_length=arguments.train_length, seed=arguments.seed)
    passage = None if arguments.run is None else read(arguments, arguments.run)
    made = provenance(choose_device(arguments.device), ["explore", *argv])
    origin = {name: made[name] for name in ("command", "commit", "device", "time")}
    origin |= {"commit": made["commit"] or INSTALLED}
    write_text(arguments.out, page(view, passage, origin))
    size = arguments.out.stat().st_size / 1e6
    print(f"wrote {arguments.out} ({size:.2f} MB); open the page in a browser")


def read(arguments: Arguments, run: Path) -> "Passage":
    """Return the computation of the model on the text."""
    from transformers.utils import logging

    from dape.device import choose_device
    from dape.evaluate.opening import open_model
    from dape.evaluate.passage import Source, passage

    logging.disable_progress_bar()  # progress bars of loading
    source = Source(arguments.length, arguments.split, arguments.document, arguments.text)
    return passage(
        open_model(run),
        source,
        data=arguments.data,
        layers=arguments.layers,
        device=choose_device(arguments.device),
    )
