"""Provenance of a result: command, commit, versions and device, for files with numbers."""

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch

import dape
from dape.strict import Holds

PACKAGES = ("transformers", "numpy")
INSTALLED = "installed package"  # in place of a commit, on pages and in tables


# Of a record that is read; earlier records have the version of cuDNN as a number.
Provenance = Annotated[
    dict[str, Any],
    Holds(
        {
            "command": str,
            "commit": str | None,
            "versions": dict[str, str | int],
            "device": str,
            "time": str,
        }
    ),
]


def provenance(device: torch.device | str, argv: list[str] | None = None) -> Provenance:
    """Return command, commit, versions, device and time of this process, for JSON.

    `argv` gives the words after `dape`, by default the words of this process.
    """
    return {
        "command": shlex.join(_words() if argv is None else ["dape", *argv]),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "dape": dape.__version__,
            "torch": str(torch.__version__),  # with the build, as 2.11.0+cu130
            **{name: version(name) for name in PACKAGES},
        },
        "device": device_name(device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _words() -> list[str]:
    """Return the words that started this process, `dape ...` or `python SCRIPT ...`."""
    script, *words = sys.argv
    own = Path(script).stem in ("dape", "__main__")
    return ["dape", *words] if own else ["python", script, *words]


def commit() -> str | None:
    """Return the commit of the checkout with this package, None for an installed package.

    `-dirty` follows if the content of a tracked file differs from the commit. Untracked files do
    not count, nor do the results that a run writes into the checkout.
    """
    source = Path(__file__)
    try:
        _git("ls-files", "--error-unmatch", source.name, folder=source.parent)
        head = _git("rev-parse", "HEAD", folder=source.parent)
        changed = _git(
            *("-c", "core.fileMode=false", "diff", "--name-only", "HEAD"),
            *("--", ":(top)", ":(top,exclude)results"),
            folder=source.parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(*words: str, folder: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def device_name(device: torch.device | str) -> str:
    """Return the name of a device: `NVIDIA H100 80GB HBM3`, or `cpu (x86_64, 2 threads)`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type
