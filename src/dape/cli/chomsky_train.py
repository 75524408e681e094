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
from dape.text import counted

if TYPE_CHECKING:
    from dape.chomsky.run import Job

Given = TypeVar("Given", bound="Recipe")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A benchmark from a recipe."""

    benchmark: Annotated[Benchmark, tyro.conf.arg(name="")]


@dataclass(frozen=True, slots=True)
class Arguments(Recipe):
    """Train and test missing models; the same command again continues.

    Lists are `--tasks even-pairs bucket-sort --schemes kerple dape-kerple --seeds 0 1`.
    `dape paper chomsky` runs `dape chomsky train` for every cell of the experiment.
    """

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto prefers a GPU"""
    together: int = 1
    """pairs of task and scheme to train side by side, with all seeds"""

    def __post_init__(self) -> None:
        """Refuse a number of pairs below 1."""
        at_least_one(self, "together")


def main(argv: list[str]) -> None:
    """Train and test missing models, with lines of progress."""
    arguments = read_arguments(argv, "dape chomsky train RECIPE.yaml", Arguments)
    from dape.chomsky.run import plan, run
    from dape.device import choose_device

    benchmark, device = arguments.benchmark, choose_device(arguments.device)
    models = sum(len(job.seeds) for job in plan(benchmark))
    print(f"{benchmark.out}: {counted(models, 'model')} to train on {device}", flush=True)
    report = partial(show, benchmark.training.steps)
    words = ["chomsky", "train", *argv]
    run(benchmark, device, report, words, arguments.together)


def read_arguments(argv: list[str], prog: str, kind: type[Given]) -> Given:
    """Return the benchmark of the file named first, changed by the options."""
    if argv and argv[0] in ("-h", "--help"):
        return parse(kind, argv, prog, kind(Benchmark()))
    if not argv or argv[0].startswith("-"):
        raise UserError(f"name a recipe first, such as recipes/chomsky.yaml: `{prog} [--option]`")
    return parse(kind, argv[1:], prog, kind(read(Path(argv[0]))))


def show(steps: int, job: "Job", step: int, losses: list[float]) -> None:
    """Print the losses of a job, ten times in all."""
    if step % max(1, steps // 10) == 0:
        words = " ".join(f"{loss:.4f}" for loss in losses)
        print(f"  {job.name}  step {step:,}/{steps:,}  loss {words}", flush=True)
