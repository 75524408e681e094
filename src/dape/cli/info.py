"""`dape info`: what is installed, which backends work here and why not, and the schemes."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from dape.cli.arguments import parse

if TYPE_CHECKING:
    from rich.table import Table

    from dape.positions.scheme import Scheme

PACKAGES = ("dape", "torch", "triton", "transformers", "lightning", "numpy", "tokenizers")
# The 125M model of the paper, for which parameters are counted.
SIZES = {"num_heads": 12, "head_dim": 64, "hidden_size": 768, "train_length": 512}
# Columns of output that is not a terminal: enough for the schemes not to be folded.
WIDTH = 130


@dataclass(frozen=True, slots=True)
class Arguments:
    """Versions, devices, attention backends and position schemes of this installation."""

    schemes: bool = False
    """Describe the schemes instead: parts, paper, parameters, and whether they extrapolate."""


def main(argv: list[str]) -> None:
    """Print the tables."""
    arguments = parse(Arguments, argv, prog="dape info")
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    if not arguments.schemes:
        console.print(installation())
        return
    console.print(bases(), "", adapters(), "")
    sizes = ", ".join(f"{name} {size}" for name, size in SIZES.items())
    console.print(f"Parameters are those of a layer, counted at {sizes}.", highlight=False)


def installation() -> "Table":
    """Return versions, devices, backends and the names of schemes."""
    import torch
    from rich.table import Table

    from dape.attention.select import BACKENDS, devices, order
    from dape.positions.scheme import ADAPTERS, BASES

    table = Table.grid(padding=(0, 2))
    table.add_row("python", platform.python_version())
    for name in PACKAGES:
        table.add_row(name, installed(name))
    for device in devices():
        table.add_row("device", device)
    for backend in BACKENDS.values():
        obstacle = backend.obstacle()
        state = "works here" if obstacle is None else f"not here: {obstacle}"
        table.add_row(f"backend {backend.name}", f"{state} ({backend.purpose})")
    names = ", ".join(order("cuda" if torch.cuda.is_available() else "cpu"))
    table.add_row("backend auto", f"takes the first of {names} that serves a call")
    table.add_row("schemes", ", ".join(BASES))
    table.add_row("adapters", ", ".join(f"{name}-" for name in ADAPTERS) + " before a scheme")
    table.add_row(
        "fused",
        f"triton and cuda serve all of these but {', '.join(unfused())}: "
        "those, and DAPE V2 behind FIRE, run in chunked",
    )
    return table


def unfused() -> list[str]:
    """Return the schemes and adapters that the fused kernels do not serve."""
    import torch

    from dape.attention.fused.tables import obstacle
    from dape.positions.scheme import ADAPTERS, BASES

    named = BASES | {f"{name}-": adapter for name, adapter in ADAPTERS.items()}
    with torch.device("meta"):
        modules = {
            name: [scheme.build(place, SIZES, {}) for place in ("bias", "adapter")]
            for name, scheme in named.items()
        }
    return [name for name, (bias, adapter) in modules.items() if obstacle(bias, adapter)]


def installed(name: str) -> str:
    """Return the version of a package, or that it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def bases() -> "Table":
    """Return the table of schemes without an adapter before them."""
    from dape.positions.scheme import BASES

    table = describe("scheme", "parameters")
    for base in BASES.values():
        cost = f"{count(base, 'rotation', 'bias', 'adapter'):,}"
        if once := count(base, "embedding"):
            cost = f"{once:,} in all"
        table.add_row(base.name, *described(base), cost, base.extrapolates)
    return table


def adapters() -> "Table":
    """Return the table of what may stand before a scheme, each once."""
    from dape.positions.scheme import ADAPTERS, BASES, compose, fits

    table = describe("adapter", "parameters", "without a bias")
    for adapter in ADAPTERS.values():
        costs = [
            f"{count(compose(adapter, base), 'adapter'):,}" if fits(adapter, base) else "-"
            for base in (BASES["alibi"], BASES["nope"])
        ]
        table.add_row(f"{adapter.name}-", *described(adapter), *costs, adapter.extrapolates)
    return table


def describe(name: str, *costs: str) -> "Table":
    """Return an empty table whose names are never cut."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(name, no_wrap=True)
    table.add_column("parts", overflow="fold")
    table.add_column("paper", overflow="fold")
    for cost in costs:
        table.add_column(cost, justify="right")
    table.add_column("extrapolates")
    return table


def described(scheme: "Scheme") -> tuple[str, str]:
    """Return what stands at each place, with its options, and the paper."""
    from dape.positions.scheme import PLACES

    texts = []
    for place in PLACES:
        if part := getattr(scheme, place):
            options = ", ".join(f"{name}={value!r}" for name, value in part.options.items())
            texts.append(f"{place} {part.module.__name__}" + f"({options})" * bool(options))
    return ", ".join(texts), f"{scheme.paper} {scheme.year}"


def count(scheme: "Scheme", *places: str) -> int:
    """Return how many parameters the modules of some places have together."""
    import torch

    with torch.device("meta"):
        modules = [scheme.build(place, SIZES, {}) for place in places]
    return sum(p.numel() for module in modules if module for p in module.parameters())
