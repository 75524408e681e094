"""Failed measurements become reasons, and further measurements continue."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from dape.bench.record import FAILED, NOT_SERVED, OUT_OF_MEMORY, Missing
from dape.errors import UserError, first_line, out_of_memory

LONGEST_REASON = 200
Outcome = TypeVar("Outcome")


def attempt(action: Callable[[], Outcome]) -> Outcome | Missing:
    """Return the result of the action, or the reason of a failure, and free the memory."""
    try:
        return action()
    except UserError as error:
        missing = Missing(NOT_SERVED, reason_of(error))
    except Exception as error:  # compilers, drivers and kernels raise any exception
        kind = OUT_OF_MEMORY if out_of_memory(error) else FAILED
        missing = Missing(kind, f"{type(error).__name__}: {reason_of(error)}")
    release()  # after the traceback, which holds frames of the failed action
    return missing


def reason_of(error: Exception) -> str:
    """Return the first line of an error's message, shortened."""
    return first_line(error)[:LONGEST_REASON] or "no reason given"


def release() -> None:
    """Free unused memory, cached blocks of the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
