"""`dape eval context`: whether models use far text, by where each token occurred last."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from dape.cli.arguments import parse
from dape.cli.eval import Lengths, choose_device, default_lengths, progress
from dape.errors import UserError


@dataclass(frozen=True, slots=True)
class Arguments:
    """Measure what models gain from a longer context on tokens that occur only far back.

    Each of the last 256 tokens of a window is sorted by the shortest of the windows that holds an
    earlier occurrence of it. Writes RUN/evaluation/context.json, which `dape plot context` draws.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, as `dape train` leaves them; model folders; names on the Hugging Face hub, whose
    results go to runs/NAME"""
    lengths: Lengths = ()
    """tokens in a window, as 128,256,512 or 128,...,16384, two or more; if not given, the training
    length and its doublings up to 16 times"""
    split: Literal["test", "validation", "train"] = "test"
    """part of the corpus"""
    documents: int = 100
    """at most so many documents, drawn among those that hold the longest window"""
    blocks: int = 4
    """at most so many blocks of scored tokens a document, evenly spread over it"""
    data: Path | None = None
    """prepared corpus; if not given, the one that the first run was trained on"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one"""
    batch_tokens: int = 16384
    """tokens in one forward; a window that is longer goes alone"""
    seed: int = 0
    """of the choice of documents"""

    def __post_init__(self) -> None:
        """Refuse counts below one, no runs, and a single length."""
        if not self.runs:
            raise UserError("no run given: dape eval context RUN...")
        for name in ("documents", "blocks", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        if len(self.lengths) == 1:
            raise UserError(f"--lengths {self.lengths[0]}: two or more, the gain is between them")


def main(argv: list[str]) -> None:
    """Measure the runs one after the other, write their files and print the tables."""
    arguments = parse(Arguments, argv, prog="dape eval context")
    from transformers.utils import logging

    from dape.evaluate.context import context_use
    from dape.evaluate.protocols import protocol
    from dape.evaluate.runs import open_run, plan
    from dape.figures.context import tables
    from dape.provenance import provenance

    logging.disable_progress_bar()  # of the loading of weights
    runs = [open_run(folder) for folder in arguments.runs]
    lengths = list(arguments.lengths or default_lengths(runs))
    corpora = [run.corpus(arguments.data) for run in runs]
    if len({corpus.checksum for corpus in corpora}) > 1:
        raise UserError("the runs were trained on different corpora; give one --data")
    asked = plan(
        corpora[0],
        arguments.split,
        protocol("last", lengths),
        lengths,
        documents=arguments.documents,
        blocks=arguments.blocks,
        seed=arguments.seed,
    )
    device = choose_device(arguments.device)
    origin = provenance(device, ["eval", "context", *argv]) | {"seed": arguments.seed}
    records = []
    with progress() as bar:
        task = bar.add_task("", total=asked.tokens * len(runs))
        for run in runs:
            record = context_use(
                run,
                asked,
                device=device,
                batch_tokens=arguments.batch_tokens,
                provenance=origin,
                advance=partial(bar.advance, task),
            )
            record.save()
            records.append(record)
    for table in tables(records):
        table.show()
    folders = " ".join(str(run.folder) for run in runs)
    print(f"draw it: dape plot context {folders} --out context.png")
