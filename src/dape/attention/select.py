"""Which backend computes a call, and why another cannot."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from dape.errors import UserError, unknown


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to compute attention: what it is for, and why it is not available here, if so."""

    name: str
    purpose: str
    obstacle: Callable[[], str | None] = lambda: None


def no_triton() -> str | None:
    """Return why Triton's kernels cannot run here; its interpreter runs them on a CPU, slowly."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA GPU"
    return None


def no_cuda() -> str | None:
    """Return why kernels compiled at run time cannot run here."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return no_triton()


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "whole score matrices, any dtype: the oracle"),
        Backend("chunked", "pure PyTorch, memory linear in the length"),
        Backend("triton", "fused kernels, static biases and DAPE V1; by request", no_triton),
        Backend("cuda", "the same with CUDA across heads; by request", no_cuda),
    )
}
FUSED = ("triton", "cuda")


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
    reason = None if backend == "auto" else BACKENDS[backend].obstacle()
    if reason is not None:
        raise UserError(f"backend={backend!r} does not work here: {reason}; use 'auto'")
    return "chunked" if backend == "auto" else backend


def devices() -> list[str]:
    """Return the devices PyTorch sees, by name."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *gpus]
