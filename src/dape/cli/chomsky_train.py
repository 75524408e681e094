"""`dape chomsky train`: the models of a benchmark."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from dape.chomsky.benchmark import Benchmark, read
from dape.cli.arguments import parse
from dape.cli.options import at_least_one
from dape.errors import UserError

if TYPE_CHECKING:
    from dape.chomsky.run import Job

Given = TypeVar("Given", bound="Recipe")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A benchmark, as a recipe describes it."""

    benchmark: Annotated[Benchmark, tyro.conf.arg(name="")]


@dataclass(frozen=True, slots=True)
class Arguments(Recipe):
    """Train and test the models that are missing; the same command again continues.

    Lists are `--tasks even-pairs bucket-sort --schemes kerple dape-kerple --seeds 0 1`. The
    experiment `dape paper chomsky` gives this command for each of its cells.
    """

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one"""
    together: int = 1
    """pairs of a task and a scheme that train side by side, all seeds of each"""

    def __post_init__(self) -> None:
        """Refuse to train none at a time."""
        at_least_one(self, "together")


def main(argv: list[str]) -> None:
    """Train and test what is missing, with a line now and then."""
    arguments = read_arguments(argv, "dape chomsky train RECIPE.yaml", Arguments)
    from dape.chomsky.run import plan, run
    from dape.device import choose_device

    benchmark, device = arguments.benchmark, choose_device(arguments.device)
    models = sum(len(job.seeds) for job in plan(benchmark))
    print(f"{benchmark.out}: {models} models to train on {device}", flush=True)
    report = partial(show, benchmark.training.steps)
    run(benchmark, device, report, ["chomsky", "train", *argv], arguments.together)


def read_arguments(argv: list[str], prog: str, kind: type[Given]) -> Given:
    """Return the benchmark of the file that is named first, with the options put over it."""
    if argv and argv[0] in ("-h", "--help"):
        return parse(kind, argv, prog, kind(Benchmark()))
    if not argv or argv[0].startswith("-"):
        raise UserError(f"name a recipe first, such as recipes/chomsky.yaml: `{prog} [--option]`")
    return parse(kind, argv[1:], prog, kind(read(Path(argv[0]))))


def show(steps: int, job: "Job", step: int, losses: list[float]) -> None:
    """Print the losses of a job, ten times in its course."""
    if step % max(1, steps // 10) == 0:
        words = " ".join(f"{loss:.4f}" for loss in losses)
        print(f"  {job.name}  step {step:,}/{steps:,}  loss {words}", flush=True)
