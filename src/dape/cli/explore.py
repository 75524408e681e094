"""`dape explore`: encodings with sliders, and a model on a text, as one page for a browser."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dape.cli.arguments import parse
from dape.cli.options import Layers, check_format
from dape.errors import UserError

if TYPE_CHECKING:
    from dape.evaluate.passage import Passage


@dataclass(frozen=True, slots=True)
class Arguments:
    """Write a page for a browser that shows every bias, with its parameters as sliders.

    With a run or a model of this package, the page also shows its scores A, its bias B, f(A, B)
    and the attention of each layer, head and query over a text. The page needs no network.
    """

    run: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="RUN")] = None
    """run folder, or model of this package; without one, the page shows encodings alone"""
    out: Path = Path("explore.html")
    """page to write"""
    layers: Layers = ()
    """layers of the model, as 0,5,11, counted from 0; by default all"""
    length: int = 128
    """tokens that the model reads; the page grows with their square"""
    text: str | None = None
    """text that the model reads; by default a document of the corpus"""
    document: int | None = None
    """number of the document in its split; by default the first that is long enough"""
    split: Literal["test", "validation", "train"] = "test"
    """part of the corpus"""
    data: Path | None = None
    """prepared corpus; by default the one that the run was trained on"""
    heads: int = 12
    """number of heads of an encoding as it starts"""
    train_length: int = 512
    """training length of an encoding as it starts"""
    seed: int = 0
    """seed of an encoding as it starts"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one"""

    def __post_init__(self) -> None:
        """Refuse other formats, a text without a key before its query, and a text twice."""
        check_format(self.out, (".html",))
        if self.length < 2:
            raise UserError(f"--length {self.length}: at least 2, a query and a key before it")
        if self.text is not None and self.document is not None:
            raise UserError("--text and --document are both given; give one of them")


def main(argv: list[str]) -> None:
    """Write the page and say where it is."""
    arguments = parse(Arguments, argv, prog="dape explore")
    from dape.device import choose_device
    from dape.figures.explore import page
    from dape.figures.view import View
    from dape.files import write_text
    from dape.provenance import provenance

    view = View(heads=arguments.heads, train_length=arguments.train_length, seed=arguments.seed)
    passage = None if arguments.run is None else read(arguments, arguments.run)
    made = provenance(choose_device(arguments.device), ["explore", *argv])
    origin = {name: made[name] for name in ("command", "commit", "device", "time")}
    write_text(arguments.out, page(view, passage, origin))
    size = arguments.out.stat().st_size / 1e6
    print(f"wrote {arguments.out} ({size:.2f} MB); open it in a browser")


def read(arguments: Arguments, run: Path) -> "Passage":
    """Return what the model makes of the text."""
    from transformers.utils import logging

    from dape.device import choose_device
    from dape.evaluate.opening import open_model
    from dape.evaluate.passage import Source, passage

    logging.disable_progress_bar()  # of the loading of weights
    source = Source(arguments.length, arguments.split, arguments.document, arguments.text)
    return passage(
        open_model(run),
        source,
        data=arguments.data,
        layers=arguments.layers,
        device=choose_device(arguments.device),
    )
