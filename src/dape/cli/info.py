"""`dape info`: what is installed, which devices there are, which backends work here and why not."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from dape.cli.arguments import parse

PACKAGES = ("dape", "torch", "triton", "transformers", "lightning", "numpy", "tokenizers")


@dataclass(frozen=True, slots=True)
class Arguments:
    """Versions, devices, attention backends and position schemes of this installation."""


def main(argv: list[str]) -> None:
    """Print the tables."""
    parse(Arguments, argv, prog="dape info")
    from rich.console import Console
    from rich.table import Table

    from dape.attention.select import BACKENDS, devices
    from dape.positions import scheme

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
    table.add_row("schemes", ", ".join(scheme.names()))
    Console().print(table)


def installed(name: str) -> str:
    """Return the version of a package, or that it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
