"""A measurement that fails becomes a reason, and the others go on."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from dape.bench.record import FAILED, NOT_SERVED, OUT_OF_MEMORY, Missing
from dape.errors import UserError, out_of_memory

LONGEST_REASON = 200
Outcome = TypeVar("Outcome")


def attempt(action: Callable[[], Outcome]) -> Outcome | Missing:
    """Return what the action does, or why it does nothing; then its memory is free again."""
    try:
        return action()
    except UserError as error:
        missing = Missing(NOT_SERVED, first_line(error))
    except Exception as error:  # compilers, drivers and kernels fail with anything
        kind = OUT_OF_MEMORY if out_of_memory(error) else FAILED
        missing = Missing(kind, f"{type(error).__name__}: {first_line(error)}")
    release()  # now that no traceback holds the frames of what failed
    return missing


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, if it is not endless."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:LONGEST_REASON] if lines else "no reason given"


def release() -> None:
    """Give back what nobody uses, cached blocks of the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
