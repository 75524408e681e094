"""Mistakes of a user, as one-line errors."""

import math
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from numbers import Integral, Real

# As PyTorch, the CUDA libraries, Triton, NCCL and the C++ library report too little memory.
_EXHAUSTED = re.compile(
    r"out of memory|(can't|cannot) allocate memory|ALLOC(ATION)?_FAILED|bad_alloc"
    r"|Storage size calculation overflowed",
    re.IGNORECASE,
)
# As exchanges between processes report the end of a process.
_PEERS = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
_LARGEST = 2**63 - 1  # of PyTorch's whole numbers


class UserError(ValueError):
    """A mistake of the user; the message names the field, the value and the remedy.

    The command line prints the message without a traceback, and exits with status 2.
    """


class RankError(UserError):
    """A fault that a single process of several meets; its message alone explains the fault."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a `name` outside the `known` names, with the nearest known name."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    listed = f"known: {', '.join(names)}" if names else "there is none"
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {what} {name!r}{hint} ({listed})")


def check_whole(least: int = 1, **values: object) -> None:
    """Raise a `UserError` unless the value is a whole number from `least` to 2^63 - 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise UserError(f"{name}={value!r} must be a whole number")
        if not least <= int(value) <= _LARGEST:
            bound = f"at least {least}" if int(value) < least else "less than 2**63"
            raise UserError(f"{name}={value} must be {bound}")


def check_finite(least: int | float = -math.inf, **values: object) -> None:
    """Raise a `UserError` unless the value is a finite number of at least `least`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"{name}={value!r} must be a finite number")
        if value < least:
            raise UserError(f"{name}={value} must be at least {least:g}")


def check_switch(**values: object) -> None:
    """Raise a `UserError` unless the value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise UserError(f"{name}={value!r} must be True or False")


def install(extra: str = "") -> str:
    """Return the command to install the package from a clone, with an extra."""
    return f"pip install '.[{extra}]' in a clone of dape" if extra else "pip install . in a clone"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0].rstrip()


def behind(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and the errors behind it that a traceback would show."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports too little memory of a GPU or of the machine.

    Libraries of CUDA, compilers and the end of a recording raise errors of their own over the
    first.
    """
    return any(
        isinstance(each, MemoryError)
        or type(each).__name__ == "OutOfMemoryError"
        or _EXHAUSTED.search(str(each))
        for each in behind(error)
    )


def of_a_peer(error: BaseException) -> bool:
    """Return whether the error of an exchange reports the end of another process."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or any(word in str(error) for word in _PEERS)
