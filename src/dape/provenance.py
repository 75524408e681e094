"""Provenance of a result: command, commit, versions and device, for files with numbers."""

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dape

PACKAGES = ("torch", "transformers", "numpy")


def provenance(device: torch.device | str, argv: list[str] | None = None) -> dict[str, Any]:
    """Return command, commit, versions, device and time of this process, ready for JSON.

    `argv` stands for the words after `dape`; without it, those of this process.
    """
    return {
        "command": shlex.join(["dape", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "versions": {"python": platform.python_version(), "dape": dape.__version__}
        | {name: version(name) for name in PACKAGES},
        "device": device_name(device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """Return the commit of this package's checkout, `-dirty` if changed; None if installed."""
    source = Path(__file__)
    git = ["git", "-C", str(source.parent)]
    try:
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", source.name], check=True, capture_output=True
        )
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def device_name(device: torch.device | str) -> str:
    """Return the name of a device: `NVIDIA H100 80GB HBM3`, or `cpu (x86_64, 2 threads)`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type
