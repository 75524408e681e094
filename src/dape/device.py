"""The device to compute on, by name, Triton, and a guard against waiting for a GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain

import torch
from torch import nn

from dape.errors import UserError, first_line
from dape.packages import has_package


def choose_device(name: str) -> torch.device:
    """Return the device called `name`, such as `cpu` or `cuda:1`; `auto` prefers a GPU to the CPU.

    A GPU has its index, without which `torch.cuda.set_device` takes none.

    Raises:
        UserError: for a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"--device {name}: {reason}; use cpu, or see `dape info`") from None
    if device.type == "meta":
        raise UserError(f"--device {name}: it computes nothing; use cpu, or see `dape info`")
    return device


def device_of(network: nn.Module, default: torch.device) -> torch.device:
    """Return the device of the first tensor of a model, where the model takes tokens."""
    tensors = chain(network.parameters(), network.buffers())
    return next((tensor.device for tensor in tensors), default)


@cache
def has_triton() -> bool:
    """Return whether Triton is installed; PyTorch for Windows comes without."""
    return has_package("triton")


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Let an operation that waits for the GPU raise a `RuntimeError`.

    The recording of a CUDA graph breaks off at an operation that waits, and leaves the allocator
    and the random generator in disorder. Look for waiting operations before the recording.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that the debug mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
