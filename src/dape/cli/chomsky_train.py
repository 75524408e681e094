"""`dape chomsky train`: the models of a benchmark."""

import time
from dataclasses import dataclass
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


def main(argv: list[str]) -> None:
    """Train what is missing."""
    arguments = read_arguments(argv, PROG, Arguments)
    train(arguments.benchmark, arguments.devices, ["chomsky", "train", *argv])


def read_arguments(argv: list[str], prog: str, kind: type[Given]) -> Given:
    """Return the benchmark of the file that is named first, with the options put over it."""
    if argv and argv[0] in ("-h", "--help"):
        return parse(kind, argv, prog, kind(Benchmark()))
    if not argv or argv[0].startswith("-"):
        raise UserError(f"name a recipe first, such as recipes/chomsky.yaml: `{prog} [--option]`")
    return parse(kind, argv[1:], prog, kind(read(Path(argv[0]))))


def train(benchmark: Benchmark, devices: str, argv: list[str]) -> None:
    """Train and test the models that are missing, with a line for each job."""
    from dape.chomsky.run import plan, run_all

    chosen, missing = choose_devices(devices), plan(benchmark)
    jobs, models = len(missing), sum(len(job.seeds) for job in missing)
    print(f"{benchmark.out}: {models} models to train on {', '.join(map(str, chosen))}", flush=True)
    start, ended = time.monotonic(), 0

    def report(job: "Job", step: int, losses: list[float]) -> None:
        if step % max(1, benchmark.training.steps // 10) == 0:
            words = " ".join(f"{loss:.4f}" for loss in losses)
            print(
                f"  {job.name}  step {step:,}/{benchmark.training.steps:,}  loss {words}",
                flush=True,
            )

    def done(job: "Job") -> None:
        nonlocal ended
        ended += 1
        hours = (time.monotonic() - start) / 3600
        left = hours / ended * (jobs - ended)
        print(f"{job.name}: done ({ended}/{jobs}, {hours:.2f} h, {left:.2f} h left)", flush=True)

    run_all(benchmark, chosen, report, done, argv)


def choose_devices(names: str) -> list["torch.device"]:
    """Return the devices of a list of names.

    Raises:
        UserError: for one that is not here.
    """
    import torch

    from dape.cli.eval import choose_device

    if names == "auto" and torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [choose_device(name) for name in names.split(",")]
