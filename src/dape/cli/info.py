"""`dape info`: versions, devices, and backends of attention with reasons against their use."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from dape.cli.arguments import parse

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PACKAGES = ("dape", "torch", "triton", "transformers", "lightning-fabric", "numpy", "tokenizers")
# Any dimensions, to build the modules of a scheme.
SIZES = {"num_heads": 2, "head_dim": 8, "hidden_size": 16, "train_length": 16}
# Columns of output to a file, wide enough for every row.
WIDTH = 130


@dataclass(frozen=True, slots=True)
class Arguments:
    """Show versions, devices and attention backends of this installation."""


def main(argv: list[str]) -> None:
    """Print the table."""
    parse(Arguments, argv, prog="dape info")
    console().print(installation())


def console() -> "Console":
    """Return the screen, wide enough for tables outside a terminal."""
    from rich.console import Console

    screen = Console()
    if not screen.is_terminal:
        screen.width = WIDTH
    return screen


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
    for name, backend in BACKENDS.items():
        reason = backend.absent()
        state = "works here" if reason is None else f"not here: {reason}"
        table.add_row(f"backend {name}", f"{state} ({backend.purpose})")
    names = ", ".join(order("cuda" if torch.cuda.is_available() else "cpu"))
    table.add_row("backend auto", f"takes the first backend that serves a call, of {names}")
    table.add_row("schemes", ", ".join(BASES))
    table.add_row("adapters", ", ".join(f"{name}-" for name in ADAPTERS) + " before a scheme")
    table.add_row(
        "fused",
        f"triton and cuda serve all schemes and adapters except {', '.join(unfused())}. "
        "The exceptions, and DAPE V2 with FIRE, run in chunked.",
    )
    return table


def unfused() -> list[str]:
    """Return the schemes and adapters not served by the fused kernels."""
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
    """Return the version of a package, or a note that the package is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
