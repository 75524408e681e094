"""`dape eval harness`: tasks of lm-eval."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from dape.cli.arguments import parse
from dape.cli.options import Lengths, Measuring, Names, at_least_one
from dape.errors import UserError


@dataclass(frozen=True)
class Arguments(Measuring):
    """Run tasks of the Language Model Evaluation Harness: `pip install '.[harness]'` in a clone.

    A model is a run folder, a folder or a hub name of any causal language model of transformers.
    Writes RUN/harness/TASK-LENGTH.json.
    """

    lengths: Lengths = ()
    """tokens kept of a request, the last; default the training length"""
    tasks: Names = ()
    """tasks of lm-eval, such as lambada_openai,wikitext (all: `lm-eval ls tasks`)"""
    include_path: Path | None = None
    """folder with tasks of your own (YAML)"""
    limit: int | None = None
    """largest number of documents of a task"""

    def __post_init__(self) -> None:
        """Refuse no tasks and no documents."""
        super().__post_init__()
        if not self.tasks:
            raise UserError("no task given: --tasks NAME,... (all: `lm-eval ls tasks`)")
        at_least_one(self, "limit")


def main(argv: list[str]) -> None:
    """Measure each model at each length, and print the table."""
    arguments = parse(Arguments, argv, prog="dape eval harness")
    from transformers.utils import logging

    from dape.cli.progress import Lines
    from dape.evaluate.harness import evaluate_harness
    from dape.figures.harness import table

    logging.disable_progress_bar()
    found = evaluate_harness(
        arguments.runs,
        arguments.tasks,
        arguments.lengths,
        include_path=arguments.include_path,
        limit=arguments.limit,
        device=arguments.device,
        batch_tokens=arguments.batch_tokens,
        out=arguments.out,
        partial_weights=arguments.partial_weights,
        command=shlex.join(["dape", "eval", "harness", *argv]),
        watch=Lines(),
    )
    table(found).show()
