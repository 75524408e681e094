"""`dape eval harness`: tasks of lm-eval."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dape.cli.arguments import parse
from dape.cli.options import Lengths, Measuring, Names, at_least_one
from dape.errors import UserError
from dape.strict import default


@dataclass(frozen=True)
class Arguments(Measuring):
    """Run tasks of the Language Model Evaluation Harness: `pip install '.[harness]'` in a clone.

    A model is a run folder, a folder or a hub name of any causal language model of transformers.
    Writes RUN/harness/TASK-LENGTH.json.
    """

    lengths: Annotated[Lengths, default("the training length")] = ()
    """number of last tokens kept of a request"""
    tasks: Annotated[Names, tyro.conf.arg(help_behavior_hint="(required)")] = ()
    """tasks of lm-eval, such as lambada_openai,wikitext (all: `lm-eval ls tasks`)"""
    include_path: Annotated[Path | None, default("only tasks of lm-eval", "PATH")] = None
    """folder with your own tasks (YAML)"""
    limit: Annotated[int | None, default("all", "INT")] = None
    """largest number of documents of a task"""
    again: bool = False
    """measure finished tasks again, instead of skipping finished tasks"""

    def __post_init__(self) -> None:
        """Refuse empty tasks and counts below 1."""
        super().__post_init__()
        if not self.tasks:
            raise UserError("no task given: --tasks NAME,... (all: `lm-eval ls tasks`)")
        at_least_one(self, "limit")


def main(argv: list[str]) -> None:
    """Measure every model at every length, and print the table."""
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
        again=arguments.again,
        partial_weights=arguments.partial_weights,
        command=shlex.join(["dape", "eval", "harness", *argv]),
        watch=Lines(),
    )
    table(found).show()
