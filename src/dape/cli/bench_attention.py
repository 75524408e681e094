"""`dape bench attention`: speed and memory against named peers, in a single process."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console

from dape.cli.arguments import parse
from dape.cli.info import installed
from dape.cli.options import Lengths, Names, at_least_one
from dape.errors import UserError
from dape.strict import default

if TYPE_CHECKING:
    import torch

    from dape.bench.record import Check, Entry, Results

# Default lengths on a GPU and on a CPU.
LENGTHS = {"cuda": (512, 2048, 8192, 32768, 131072), "cpu": (256, 512, 1024)}
RESULTS, TABLE, FIGURE = "results.json", "table.md", "figure.png"


@dataclass(frozen=True, slots=True)
class Arguments:
    """Measure time and peak memory of attention over length, forward and with backward.

    First, output and gradients of every method are checked against float64. A wrong method ends the
    command before any timing. Writes results.json, table.md and figure.png, updated after every
    measurement.

    Methods: sdpa, sdpa-cudnn, sdpa-flash, textbook, textbook-compiled, chunked, chunked-compiled,
    flex, flex-table, triton, cuda. Ratios are to sdpa.
    """

    scheme: str = "dape-kerple"
    """scheme with the bias and adapter to time, such as kerple (`dape info schemes`)"""
    shape: str = "125m"
    """heads and width of a head, from a recipe (125m, 350m, 2.7b, 6.7b) or as 12x64"""
    lengths: Annotated[Lengths, default("512 to 131,072, on a CPU 256 to 1,024")] = ()
    """tokens of a sequence, as 512,...,8192"""
    tokens: int = 16384
    """tokens of a call; the batch is TOKENS / LENGTH, and at least 1"""
    methods: Annotated[Names, default("all")] = ()
    """methods to compare, as cuda,textbook; sdpa always runs"""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """dtype of query, key and value"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto prefers a GPU"""
    seed: int = 0
    """seed of inputs and parameters"""
    out: Path = Path("runs/bench")
    """folder for results; existing files are overwritten"""

    def __post_init__(self) -> None:
        """Refuse empty problems."""
        at_least_one(self, "tokens")
        if self.lengths and min(self.lengths) < 2:
            raise UserError(f"--lengths {min(self.lengths)}: must be at least 2 tokens")


def main(argv: list[str]) -> None:
    """Check and time every method, with a line for each, then print the tables."""
    arguments = parse(Arguments, argv, prog="dape bench attention")
    from dape.bench.attention import Plan, run
    from dape.bench.record import load
    from dape.figures.speed import draw, page, tables
    from dape.figures.style import save
    from dape.files import check_writable, write_text

    out, console = arguments.out, Console(stderr=True)
    check_writable(*(out / name for name in (RESULTS, TABLE, FIGURE)))
    device = bench_device(arguments.device)
    plan = Plan(
        scheme=arguments.scheme,
        shape=arguments.shape,
        lengths=arguments.lengths or LENGTHS[device.type],
        tokens=arguments.tokens,
        methods=arguments.methods,
        dtype=arguments.dtype,
        device=device,
        seed=arguments.seed,
    )

    def keep(results: "Results") -> None:
        results.save(out / RESULTS)
        write_text(out / TABLE, page(results, FIGURE))

    run(plan, origin(device, ["bench", "attention", *argv]), partial(announce, console), keep)
    results = load(out / RESULTS)
    save(draw(results), out / FIGURE)
    for table in tables(results):
        table.show()
    print(f"wrote {out / RESULTS}, {out / TABLE} and {out / FIGURE}")


def bench_device(name: str) -> "torch.device":
    """Return a device with a clock, and make a GPU the current device."""
    import torch

    from dape.device import choose_device

    device = choose_device(name)
    if device.type not in LENGTHS:
        raise UserError(f"--device {name}: the clock needs {' or '.join(LENGTHS)}")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def origin(device: "torch.device", words: Sequence[str]) -> dict[str, Any]:
    """Return the provenance of the results, with the versions of libraries behind attention."""
    import torch

    from dape.provenance import provenance

    made = provenance(device, list(words))
    made["versions"]["triton"] = installed("triton")
    if device.type == "cuda":
        found = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        made["versions"] |= {name: str(each) for name, each in found.items() if each is not None}
    return made


def announce(console: Console, done: "Check | Entry") -> None:
    """Print a line on the latest check or measurement."""
    words = [f"length {done.length:,}", done.method, done.direction, outcome(done)]
    console.print("  ".join(words), highlight=False, soft_wrap=True, markup=False)


def outcome(done: "Check | Entry") -> str:
    """Return the outcome in a few words."""
    from dape.bench.record import Check

    if done.missing is not None:
        return f"{done.missing.kind}: {done.missing.reason}"
    if isinstance(done, Check):
        name = done.worst
        return (
            f"checked on {done.batch:,} x {done.checked:,}: {name} is {done.errors[name]:.1e} from "
            f"float64, of {done.limits[name]:.1e}"
        )
    memory = "" if done.peak is None else f"  peak {done.peak / 2**20:,.1f} MiB"
    host = ""
    if done.eager is not None:
        host = f"  eager {done.eager:,.3f} ms, {done.launches} launches"
    return f"{done.milliseconds:,.3f} ms{host}{memory}  ({done.runs} x {done.calls}, {done.clock})"
