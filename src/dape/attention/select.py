"""Which backend computes a call, and why another cannot."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dape.errors import UserError, unknown


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to compute attention: what it is for, and why it is not available here, if so."""

    name: str
    purpose: str
    obstacle: Callable[[], str | None] = lambda: None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "whole score matrices, any dtype: the oracle"),
        Backend("chunked", "pure PyTorch, memory linear in the length"),
    )
}


def select(backend: str, return_weights: bool = False) -> str:
    """Return the name of the backend for a call: `auto` is the fastest that serves it.

    Raises:
        UserError: for an unknown backend, or one that cannot serve the call here, saying why.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise unknown("backend", backend, ("auto", *BACKENDS))
    if return_weights:
        if backend not in ("auto", "reference"):
            raise UserError(
                f"backend={backend!r} never holds the attention weights; "
                "return_weights needs 'reference' or 'auto'"
            )
        return "reference"
    return "chunked" if backend == "auto" else backend


def devices() -> list[str]:
    """Return the devices PyTorch sees, by name."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *gpus]
