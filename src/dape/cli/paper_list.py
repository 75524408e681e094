"""`dape paper list`: the experiments."""

from dataclasses import dataclass

from dape.cli.arguments import parse


@dataclass(frozen=True, slots=True)
class Arguments:
    """List the experiments, with the reproduced tables and figures of the paper."""


def main(argv: list[str]) -> None:
    """Print a line per experiment."""
    parse(Arguments, argv, prog="dape paper list")
    from dape.paper.experiments import EXPERIMENTS

    for each in EXPERIMENTS.values():
        print(f"{each.name:<14}{each.title} ({each.shows})")
