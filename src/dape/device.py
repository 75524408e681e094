"""The device to compute on, by name, and what a GPU must not be asked."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from dape.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device called `name`, such as `cpu` or `cuda:1`; `auto` is a GPU if there is one.

    Raises:
        UserError: for a device that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason}; use cpu, or see `dape info`") from None


def device_of(network: nn.Module, default: torch.device) -> torch.device:
    """Return where the first tensor of a model lies, which is where it takes tokens."""
    tensors = chain(network.parameters(), network.buffers())
    return next((tensor.device for tensor in tensors), default)


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Let an operation that waits for the GPU raise a `RuntimeError`.

    The recording of a CUDA graph breaks off at such an operation, and leaves the allocator and the
    random generator in disorder: look for them before.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
