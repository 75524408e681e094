"""`dape chomsky tasks`: the fifteen tasks."""

from dataclasses import dataclass

from dape.cli.arguments import parse


@dataclass(frozen=True, slots=True)
class Arguments:
    """List the tasks: level, symbols, length of the output, and scores without reading the input.

    `constant` is the score of the best constant answer. `blind` is the score of the most frequent
    symbol at every output position. Both scores are percentages of scored symbols over lengths 41
    to 500.
    """


def main(argv: list[str]) -> None:
    """Print the table."""
    parse(Arguments, argv, prog="dape chomsky tasks")
    from dape.chomsky.tasks import TASKS
    from dape.figures.tables import Table

    rows = [
        [
            task.name,
            task.level,
            "no" if task.permutable else "yes",
            str(len(task.inputs)),
            str(len(task.outputs)),
            f"{task.output_length(40):,}",
            f"{task.output_length(500):,}",
            f"{task.chance:.1f}",
            f"{task.blind:.1f}",
        ]
        for task in TASKS.values()
    ]
    Table(
        title="Tasks of the Chomsky-hierarchy benchmark",
        header=[
            *("task", "level", "order matters", "symbols in", "symbols out"),
            *("output at 40", "output at 500", "constant", "blind"),
        ],
        rows=rows,
        note="constant, blind: percent right without reading the input.",
    ).show()
