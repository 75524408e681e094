"""`dape eval context`: whether models use far text, by where each token occurred last."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dape.cli.arguments import parse
from dape.cli.options import Lengths, Measuring, at_least_one
from dape.errors import UserError


@dataclass(frozen=True)
class Arguments(Measuring):
    """Measure what models gain from a longer context on tokens that occur only far back.

    Each of the last 256 tokens of a window is sorted by the shortest of the windows that holds an
    earlier occurrence of it. Writes RUN/evaluation/context.json, which `dape plot context` draws.
    The same command again goes on where an interrupted one stopped.
    """

    lengths: Lengths = ()
    """tokens in a window, two lengths or more; default the training length, doubled to 16 times"""
    split: Literal["test", "validation", "train"] = "test"
    """split of the corpus"""
    documents: int = 100
    """largest number of documents, drawn among those longer than the longest window"""
    blocks: int = 4
    """largest number of scored blocks in a document, evenly spread"""
    data: Path | None = None
    """prepared corpus; default the corpus of the first run's training"""
    seed: int = 0
    """seed of the choice of documents"""
    again: bool = False
    """measure finished lengths again; by default they are skipped"""

    def __post_init__(self) -> None:
        """Refuse counts below one, no runs, and a single length."""
        super().__post_init__()
        at_least_one(self, "documents", "blocks")
        if len(self.lengths) == 1:
            raise UserError(f"--lengths {self.lengths[0]}: two or more, the gain is between them")


def main(argv: list[str]) -> None:
    """Measure the runs one after the other, write their files and print the tables."""
    arguments = parse(Arguments, argv, prog="dape eval context")
    from transformers.utils import logging

    from dape.cli.progress import progress
    from dape.evaluate.context import evaluate_context
    from dape.evaluate.results import drawing
    from dape.figures.context import tables

    logging.disable_progress_bar()  # of the loading of weights
    with progress() as watch:
        records = evaluate_context(
            arguments.runs,
            arguments.data,
            arguments.lengths,
            split=arguments.split,
            documents=arguments.documents,
            blocks=arguments.blocks,
            seed=arguments.seed,
            device=arguments.device,
            batch_tokens=arguments.batch_tokens,
            out=arguments.out,
            again=arguments.again,
            partial_weights=arguments.partial_weights,
            command=shlex.join(["dape", "eval", "context", *argv]),
            watch=watch,
        )
    for table in tables(records):
        table.show()
    print(drawing("context", [each.subject.run for each in records], arguments.out))
