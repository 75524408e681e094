"""Failed measurements become reasons, and further measurements continue."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from dape.bench.record import FAILED, NOT_SERVED, OUT_OF_MEMORY, Missing
from dape.errors import UserError, out_of_memory

LONGEST_REASON = 200
Outcome = TypeVar("Outcome")


def attempt(action: Callable[[], Outcome]) -> Outcome | Missing:
    """Return the result of the action, or the reason of a failure, and free the memory."""
    try:
        return action()
    except UserError as error:
        missing = Missing(NOT_SERVED, first_line(error))
    except Exception as error:  # compilers, drivers and kernels raise any exception
        kind = OUT_OF_MEMORY if out_of_memory(error) else FAILED
        missing = Missing(kind, f"{type(error).__name__}: {first_line(error)}")
    release()  # after the traceback, which holds frames of the failed action
    return missing


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:LONGEST_REASON] if lines else "no reason given"


def release() -> None:
    """Free unused memory, cached blocks of the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
