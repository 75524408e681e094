"""`dape eval retrieval`: a hidden number over depth and length."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from dape.cli.arguments import parse
from dape.cli.options import Fractions, Measuring, Names, at_least_one
from dape.errors import UserError
from dape.strict import default


@dataclass(frozen=True)
class Arguments(Measuring):
    """Ask models at the end of a long text for a number hidden in the text.

    A model is a run folder, a folder or a hub name of any causal language model of transformers.
    Writes RUN/retrieval/TASK.json, for `dape plot retrieval`.
    """

    tasks: Names = ("passkey",)
    """passkey (among repeated sentences), needle (in text of the corpus), or passkey,needle"""
    depths: Fractions = (0.0, 0.25, 0.5, 0.75, 1.0)
    """fraction of the text before the number"""
    trials: int = 10
    """numbers to find per length and depth"""
    data: Annotated[Path | None, default("the corpus of the training", "PATH")] = None
    """prepared corpus around a needle"""
    split: Literal["test", "validation", "train"] = "test"
    """split of the corpus"""
    seed: int = 0
    """seed of the hidden numbers"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """precision of products; auto is bf16 on a GPU for bf16 runs and models beside them"""
    again: bool = False
    """measure finished lengths again, instead of skipping finished lengths"""

    def __post_init__(self) -> None:
        """Refuse depths outside the text, and trials below 1."""
        super().__post_init__()
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise UserError(f"--depths {','.join(map(str, self.depths))}: give depths from 0 to 1")
        at_least_one(self, "trials")


def main(argv: list[str]) -> None:
    """Measure every model on every task, and print the tables."""
    arguments = parse(Arguments, argv, prog="dape eval retrieval")
    from transformers.utils import logging

    from dape.cli.progress import progress
    from dape.evaluate.results import drawing
    from dape.evaluate.retrieval import evaluate_retrieval
    from dape.figures.retrieval import table

    logging.disable_progress_bar()
    with progress() as watch:
        found = evaluate_retrieval(
            arguments.runs,
            arguments.tasks,
            arguments.lengths,
            arguments.data,
            depths=arguments.depths,
            trials=arguments.trials,
            split=arguments.split,
            seed=arguments.seed,
            device=arguments.device,
            precision=arguments.precision,
            batch_tokens=arguments.batch_tokens,
            out=arguments.out,
            again=arguments.again,
            partial_weights=arguments.partial_weights,
            command=shlex.join(["dape", "eval", "retrieval", *argv]),
            watch=watch,
        )
    for name in arguments.tasks:
        table([each for each in found if each.task == name]).show()
    print(drawing("retrieval", [each.subject.run for each in found], arguments.out))
