"""`dape eval context`: whether models use far text, by the last occurrence of tokens."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from dape.cli.arguments import parse
from dape.cli.options import Lengths, Measuring, at_least_one
from dape.errors import UserError
from dape.strict import default


@dataclass(frozen=True)
class Arguments(Measuring):
    """Measure the gain of a longer context on tokens with their last occurrence far back.

    The last 256 tokens of a window are sorted into bins, by the shortest window with an earlier
    occurrence of the token. Writes RUN/evaluation/context.json, for `dape plot context`.
    A repeated command resumes behind the last finished length.
    """

    lengths: Annotated[Lengths, default("the training length, doubled up to 16 times")] = ()
    """tokens in a window, two lengths or more"""
    split: Literal["test", "validation", "train"] = "test"
    """split of the corpus"""
    documents: int = 100
    """largest number of documents, drawn among documents longer than the longest window"""
    blocks: int = 4
    """largest number of scored blocks in a document, evenly spread"""
    data: Annotated[Path | None, default("the corpus of the first run's training", "PATH")] = None
    """prepared corpus"""
    seed: int = 0
    """seed of the choice of documents"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """precision of products; auto is bf16 on a GPU for bf16 runs and models beside them"""
    again: bool = False
    """measure finished lengths again; by default they are skipped"""

    def __post_init__(self) -> None:
        """Refuse counts below 1, an empty list of runs, and a single length."""
        super().__post_init__()
        at_least_one(self, "documents", "blocks")
        if len(self.lengths) == 1:
            raise UserError(f"--lengths {self.lengths[0]}: give two lengths or more, to compare")


def main(argv: list[str]) -> None:
    """Measure the runs in turn, write their files and print the tables."""
    arguments = parse(Arguments, argv, prog="dape eval context")
    from transformers.utils import logging

    from dape.cli.progress import progress
    from dape.evaluate.context import evaluate_context
    from dape.evaluate.results import drawing
    from dape.figures.context import tables

    logging.disable_progress_bar()  # progress bars of loading
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
            precision=arguments.precision,
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
