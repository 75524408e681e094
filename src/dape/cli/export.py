"""`dape export`: a run as a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from dape.cli.arguments import parse
from dape.errors import UserError
from dape.files import whole


@dataclass(frozen=True, slots=True)
class Arguments:
    """Make a Hugging Face folder of a run: weights, configuration, tokenizer and model card.

    The model is that of the finished run, or else of its latest checkpoint. The card holds the data
    with its checksum, the recipe, and what `dape eval` measured before.
    """

    run: tyro.conf.Positional[Path]
    """run folder, written by `dape train`"""
    out: Path
    """folder to write; its name is the name of the model on the card"""


def main(argv: list[str]) -> None:
    """Write the folder, whole or not at all, and say where it is."""
    arguments = parse(Arguments, argv, prog="dape export")
    out = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there and not empty; give another, or delete it")
    from transformers.utils import logging

    from dape.figures.card import card
    from dape.train.restore import restore

    logging.disable_progress_bar()
    trained = restore(arguments.run)
    written = card(trained, out.resolve().name)
    with whole(out) as partial:
        trained.model.save_pretrained(partial)
        trained.tokenizer.save_pretrained(partial)
        written.save(partial / "README.md")
    print(f"wrote {out}, the model after {trained.step:,} steps; share it: hf upload NAME {out}")
