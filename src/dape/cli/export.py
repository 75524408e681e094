"""`dape export`: a run as a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from dape.cli.arguments import parse
from dape.errors import UserError
from dape.files import check_writable, locked, whole
from dape.text import counted


@dataclass(frozen=True, slots=True)
class Arguments:
    """Make a Hugging Face folder of a run: weights, configuration, tokenizer and model card.

    The model comes from the finished run, or from the latest checkpoint. The card has the data with
    a checksum, the recipe, and results of `dape eval`.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """run folder, written by `dape train`"""
    out: Path
    """folder to write, and name of the model on the card"""


def main(argv: list[str]) -> None:
    """Write the folder, whole or not at all, and print its path."""
    arguments = parse(Arguments, argv, prog="dape export")
    out = arguments.out
    check_writable(out / "README.md")
    with locked(out.absolute().parent, f"another process is writing {out}", out.name):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} exists and is not empty; give another, or delete {out}")
        export(arguments.run, out)


def export(run: Path, out: Path) -> None:
    """Write the folder."""
    from transformers.utils import logging

    from dape.figures.card import card
    from dape.train.restore import restore

    logging.disable_progress_bar()
    trained = restore(run)
    written = card(trained, out.resolve().name)
    with whole(out) as partial:
        trained.model.save_pretrained(partial)
        trained.tokenizer.save_pretrained(partial)
        written.save(partial / "README.md")
    share = f"hf upload NAME {quote(str(out))}"
    print(f"wrote {out}, the model after {counted(trained.step, 'step')}; to share: {share}")
