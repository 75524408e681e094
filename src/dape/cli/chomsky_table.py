"""`dape chomsky table`: tables and figures of a benchmark's finished cells."""

from dataclasses import dataclass

from dape.cli.chomsky_train import Recipe, read_arguments


@dataclass(frozen=True, slots=True)
class Arguments(Recipe):
    """Write the table, the figures and the recipe beside the finished cells.

    Lists are `--tasks even-pairs bucket-sort --schemes kerple dape-kerple --seeds 0 1`.
    """


def main(argv: list[str]) -> None:
    """Write the files and print their paths."""
    arguments = read_arguments(argv, "dape chomsky table RECIPE.yaml", Arguments)
    from dape.figures.chomsky import write

    for file in write(arguments.benchmark, ["chomsky", "table", *argv]):
        print(f"wrote {file}")
