"""`dape bench model`: time and memory of whole models by scheme, size and length."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from dape.cli.arguments import parse
from dape.cli.bench_attention import bench_device, origin
from dape.cli.options import Lengths, Names, at_least_one

if TYPE_CHECKING:
    from dape.bench.model import Cost, Costs

RESULTS, TABLE = "results.json", "table.md"
DIRECTIONS = {
    "forward": ("forward",),
    "training": ("forward + backward",),
    "generation": ("next token",),
    "both": ("forward", "forward + backward"),
    "all": ("forward", "forward + backward", "next token"),
}


@dataclass(frozen=True, slots=True)
class Arguments:
    """Measure time and memory of whole models with random weights.

    Writes results.json and table.md, updated after every measurement.
    """

    sizes: Names = ("125m",)
    """sizes of the paper's models: small, 125m, 350m, 2.7b, 6.7b"""
    schemes: Names = ("nope", "rope", "t5", "alibi", "kerple", "fire", "dape-kerple")
    """schemes to compare (`dape info schemes`); ratios divide by nope"""
    forms: Names = ("fused", "textbook")
    """fused (the fastest backend), textbook (whole score matrices), or fused,textbook"""
    lengths: Lengths = (512, 1024, 2048, 4096, 8192)
    """tokens of a sequence, as 512,2048 or 512,...,8192"""
    batch: int = 1
    """sequences of a call"""
    directions: Literal["forward", "training", "generation", "both", "all"] = "both"
    """forward pass, forward and backward pass, the next token, the first two, or all"""
    vocab_size: int = 50304
    """entries of the embedding"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto prefers a GPU"""
    seed: int = 0
    """seed of weights and tokens"""
    out: Path = Path("runs/bench-model")
    """folder for results; existing files are overwritten"""

    def __post_init__(self) -> None:
        """Refuse empty problems."""
        at_least_one(self, "batch", "vocab_size")


def main(argv: list[str]) -> None:
    """Measure every model, with a line per measurement, then print the tables."""
    arguments = parse(Arguments, argv, prog="dape bench model")
    from dape.bench.model import Plan, run
    from dape.figures.costs import tables
    from dape.files import check_writable

    check_writable(arguments.out / RESULTS, arguments.out / TABLE)
    device = bench_device(arguments.device)
    plan = Plan(
        sizes=arguments.sizes,
        schemes=arguments.schemes,
        forms=arguments.forms,
        lengths=arguments.lengths,
        batch=arguments.batch,
        directions=DIRECTIONS[arguments.directions],
        vocab_size=arguments.vocab_size,
        device=device,
        seed=arguments.seed,
    )
    made = origin(device, ["bench", "model", *argv])
    costs = run(plan, made, partial(_keep, arguments.out, Console(stderr=True)))
    for table in tables(costs):
        table.show()
    print(f"wrote {arguments.out / RESULTS} and {arguments.out / TABLE}")


def _keep(out: Path, console: Console, costs: "Costs", latest: "Cost") -> None:
    from dape.figures.costs import page
    from dape.figures.speed import milliseconds
    from dape.files import write_text

    costs.save(out / RESULTS)
    write_text(out / TABLE, page(costs))
    entry = latest.entry
    time = milliseconds(entry) + ("" if entry.missing else " ms")
    reason = f" ({entry.missing.reason})" if entry.missing else ""
    words = [latest.size, entry.method, latest.form, f"length {entry.length:,}", entry.direction]
    text = "  ".join([*words, time + reason])
    console.print(text, highlight=False, soft_wrap=True, markup=False)
