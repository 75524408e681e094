"""`dape chomsky sample`: examples of a task."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from dape.cli.arguments import parse
from dape.cli.options import at_least_one
from dape.errors import UserError

MOST = 1_000_000  # symbols


@dataclass(frozen=True, slots=True)
class Arguments:
    """Print examples of a task as `input -> output`, with the scored output symbols."""

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK")]
    """name of a task (`dape chomsky tasks`)"""
    length: int = 11
    """number of symbols of the input"""
    count: int = 5
    """number of examples to print"""
    seed: int = 0
    """seed of the examples"""

    def __post_init__(self) -> None:
        """Refuse counts below 1, and a text that nobody reads."""
        at_least_one(self, "length", "count")
        if self.length * self.count > MOST:
            raise UserError(
                f"--length {self.length} times --count {self.count} must be at most {MOST} symbols"
            )


def main(argv: list[str]) -> None:
    """Print the examples."""
    arguments = parse(Arguments, argv, prog="dape chomsky sample")
    from dape.chomsky.task import single
    from dape.chomsky.tasks import resolve

    task = resolve(arguments.task)
    sample = task.sample(single(arguments.seed, arguments.count), arguments.length)
    for inputs, outputs, scored in zip(*sample, strict=True):
        given = " ".join(task.inputs[symbol] for symbol in inputs.tolist())
        answer = " ".join(task.outputs[symbol] for symbol in outputs[scored].tolist())
        print(f"{given} -> {answer}")
