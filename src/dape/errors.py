"""Mistakes of a user, as errors of one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake of the user; the message names the field, the value and the remedy.

    The command line prints the message without a traceback, and exits with status 2.
    """


class RankError(UserError):
    """A fault that one of several processes meets, and the others do not: it speaks for itself."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a `name` that is not among the `known` ones, with the nearest first."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {what} {name!r}{hint} (known: {', '.join(names)})")


def install(extra: str = "") -> str:
    """Return the command that installs the package from a clone, with an extra."""
    return f"pip install '.[{extra}]' in a clone of dape" if extra else "pip install . in a clone"


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a GPU or of the machine is too small."""
    import torch

    exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return exhausted or "can't allocate memory" in str(error)
