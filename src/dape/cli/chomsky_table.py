"""`dape chomsky table`: the benchmark from nothing to a table and figures."""

from dataclasses import dataclass

from dape.cli.chomsky_train import Arguments, read_arguments, train

PROG = "dape chomsky table RECIPE.yaml"


@dataclass(frozen=True, slots=True)
class TableArguments(Arguments):
    """Train what is missing, then write the table, the figures and the recipe beside the cells.

    Lists are `--tasks even-pairs bucket-sort --schemes kerple dape-kerple --seeds 0 1`.
    """

    finished: bool = False
    """train nothing, and write the table of the finished cells"""


def main(argv: list[str]) -> int:
    """Train, write, and say where."""
    arguments = read_arguments(argv, PROG, TableArguments)
    words = ["chomsky", "table", *argv]
    status = 0 if arguments.finished else train(arguments, words)
    from dape.figures.chomsky import write

    for file in write(arguments.benchmark, words):
        print(f"wrote {file}")
    return status
