"""`dape info schemes`: every scheme and adapter, with paper and parameters."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dape.cli.arguments import parse
from dape.cli.info import console

if TYPE_CHECKING:
    from rich.table import Table

    from dape.positions.scheme import Scheme

# The 125M model of the paper, to count parameters.
SIZES = {"num_heads": 12, "head_dim": 64, "hidden_size": 768, "train_length": 512}


@dataclass(frozen=True, slots=True)
class Arguments:
    """List position schemes: places, paper, parameters of a layer, and extrapolation."""


def main(argv: list[str]) -> None:
    """Print the tables."""
    parse(Arguments, argv, prog="dape info schemes")
    screen = console()
    screen.print(bases(), "", adapters(), "")
    sizes = ", ".join(f"{name} {size}" for name, size in SIZES.items())
    screen.print(f"Parameters are counted in a layer, at {sizes}.", highlight=False)


def bases() -> "Table":
    """Return the table of schemes without an adapter before a base."""
    from dape.positions.scheme import BASES

    table = describe("scheme", "parameters")
    for base in BASES.values():
        cost = f"{count(base, 'rotation', 'bias', 'adapter'):,}"
        if once := count(base, "embedding"):
            cost = f"{once:,} in all"
        table.add_row(base.name, *described(base), cost, base.extrapolates)
    return table


def adapters() -> "Table":
    """Return the table of adapters that may precede a base."""
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
    """Return an empty table with names never cut."""
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
    """Return the module at each place, with options, and the paper."""
    from dape.positions.scheme import PLACES

    texts = []
    for place in PLACES:
        if part := getattr(scheme, place):
            options = ", ".join(f"{name}={value!r}" for name, value in part.options.items())
            given = f"({options})" if options else ""
            texts.append(f"{place} {part.module.__name__}{given}")
    return ", ".join(texts), f"{scheme.paper} {scheme.year}"


def count(scheme: "Scheme", *places: str) -> int:
    """Return the number of parameters of the modules at some places."""
    import torch

    with torch.device("meta"):
        modules = [scheme.build(place, SIZES, {}) for place in places]
    return sum(p.numel() for module in modules if module for p in module.parameters())
