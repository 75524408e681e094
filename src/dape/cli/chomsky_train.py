"""`dape chomsky train`: the models of a benchmark."""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from dape.chomsky.benchmark import Benchmark, read
from dape.cli.arguments import parse
from dape.errors import UserError

if TYPE_CHECKING:
    import torch

    from dape.chomsky.run import Job

Given = TypeVar("Given", bound="Arguments")


PROG = "dape chomsky train RECIPE.yaml"


@dataclass(frozen=True, slots=True)
class Arguments:
    """Train and test the models that are missing; the same command again continues.

    Lists are `--tasks even-pairs bucket-sort --schemes kerple dape-kerple --seeds 0 1`.
    """

    benchmark: Annotated[Benchmark, tyro.conf.arg(name="")]
    devices: str = "auto"
    """cpu, cuda:0, or several as cuda:0,cuda:1; auto takes every GPU, else the CPU"""
    minutes: float = math.inf
    """start no cell after as many minutes"""


def main(argv: list[str]) -> int:
    """Train what is missing."""
    return train(read_arguments(argv, PROG, Arguments), ["chomsky", "train", *argv])


def read_arguments(argv: list[str], prog: str, kind: type[Given]) -> Given:
    """Return the benchmark of the file that is named first, with the options put over it."""
    if argv and argv[0] in ("-h", "--help"):
        return parse(kind, argv, prog, kind(Benchmark()))
    if not argv or argv[0].startswith("-"):
        raise UserError(f"name a recipe first, such as recipes/chomsky.yaml: `{prog} [--option]`")
    return parse(kind, argv[1:], prog, kind(read(Path(argv[0]))))


def train(arguments: Arguments, argv: list[str]) -> int:
    """Train and test the models that are missing, a line for each job; return 1 if one failed."""
    from dape.chomsky.run import plan, run_all

    benchmark, devices = arguments.benchmark, choose_devices(arguments.devices)
    jobs = plan(benchmark)
    models = sum(len(job.seeds) for job in jobs)
    print(
        f"{benchmark.out}: {models} models to train on {', '.join(map(str, devices))}", flush=True
    )
    start, failed = time.monotonic(), 0
    report = partial(show, benchmark.training.steps)
    for number, end in enumerate(run_all(benchmark, devices, report, argv, arguments.minutes), 1):
        failed += end.error is not None
        hours = (time.monotonic() - start) / 3600
        left = hours / number * (len(jobs) - number)
        how = f"failed: {end.error}" if end.error else "done"
        print(f"{end.job.name}: {how} ({number}/{len(jobs)}, about {left:.2f} h left)", flush=True)
    return 1 if failed else 0


def show(steps: int, job: "Job", step: int, losses: list[float]) -> None:
    """Print the losses of a job, ten times in its course."""
    if step % max(1, steps // 10) == 0:
        words = " ".join(f"{loss:.4f}" for loss in losses)
        print(f"  {job.name}  step {step:,}/{steps:,}  loss {words}", flush=True)


def choose_devices(names: str) -> list["torch.device"]:
    """Return the devices of a list of names.

    Raises:
        UserError: for one that is not here.
    """
    import torch

    from dape.device import choose_device

    if names == "auto" and torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [choose_device(name) for name in names.split(",")]
