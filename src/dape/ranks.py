"""The processes of a command, as a launcher such as `torchrun` numbers them by variables."""

import os

from dape.errors import RankError

_LAUNCHED = "start several processes by `torchrun`, or unset its variables"


def ranks() -> int:
    """Return the number of processes of this command, as started by `torchrun`, or 1.

    Raises:
        RankError: for a value that no launcher can have set.
    """
    return _from_environment("WORLD_SIZE", 1)


def rank() -> int:
    """Return the number of this process among `ranks()`.

    Raises:
        RankError: for a number that a launcher cannot have set.
    """
    found = _from_environment("RANK", 0)
    if found >= ranks():
        raise RankError(f"the environment has RANK={found} and WORLD_SIZE={ranks()}; {_LAUNCHED}")
    return found


def is_first_rank() -> bool:
    """Return whether this process is the first, which prints and writes for all."""
    return rank() == 0


def local_rank() -> int:
    """Return the number of this process among the processes of this machine.

    Raises:
        RankError: for a value that no launcher can have set.
    """
    return _from_environment("LOCAL_RANK", 0)


def local_ranks() -> int:
    """Return the number of processes on this machine.

    Raises:
        RankError: for a value that no launcher can have set.
    """
    return _from_environment("LOCAL_WORLD_SIZE", 1)


def check_launched() -> None:
    """Refuse several processes without the variables by which they find each other.

    Raises:
        RankError: naming the variables; the process would wait for processes that nobody started.
    """
    absent = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if ranks() > 1 and absent:
        raise RankError(
            f"the environment has WORLD_SIZE={ranks()} without {', '.join(sorted(absent))};"
            f" {_LAUNCHED}"
        )


def check_same(folder: object, checksum: str, first: str) -> None:
    """Refuse files unlike those of the first process, as on a machine with files of its own.

    Raises:
        RankError: with both checksums.
    """
    if checksum != first:
        raise RankError(
            f"rank {rank()} of {ranks()}: {folder} has checksum {checksum[:12]}, and {first[:12]}"
            " for the first process; copy the folder from the machine of the first process"
        )


def _from_environment(name: str, default: int) -> int:
    """Return a number that a launcher sets."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise RankError(f"the environment has {name}={text!r}, no whole number; {_LAUNCHED}")
    return int(text)
