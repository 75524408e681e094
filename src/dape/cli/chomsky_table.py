"""`dape chomsky table`: the benchmark from nothing to a table and figures."""

from dataclasses import dataclass

from dape.cli import chomsky_train

PROG = "dape chomsky table RECIPE.yaml"


@dataclass(frozen=True, slots=True)
class Arguments(chomsky_train.Arguments):
    """Train what is missing, then write the table, the figures and the recipe beside the cells.

    Lists are `--tasks even-pairs bucket-sort --schemes kerple dape-kerple --seeds 0 1`.
    """

    finished: bool = False
    """train nothing, and write the table of the finished cells"""


def main(argv: list[str]) -> int:
    """Train, write, and say where."""
    arguments = chomsky_train.read_arguments(argv, PROG, Arguments)
    words = ["chomsky", "table", *argv]
    status = 0 if arguments.finished else chomsky_train.train(arguments, words)
    from dape.figures.chomsky import write

    for file in write(arguments.benchmark, words):
        print(f"wrote {file}")
    return status
