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


def no_gpu() -> str | None:
    """Return why PyTorch has no CUDA GPU here."""
    if torch.cuda.is_available():
        return None
    return "no CUDA GPU" if torch.version.cuda else "this PyTorch is built without CUDA"


def no_triton() -> str | None:
    """Return why Triton's kernels cannot run here; its interpreter runs them on a CPU, slowly."""
    if find_spec("triton") is None:
        return "triton is not installed"
    return None if os.environ.get("TRITON_INTERPRET") == "1" else no_gpu()


def no_cuda() -> str | None:
    """Return why kernels compiled at run time cannot run here."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return no_gpu() or no_triton()


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "whole score matrices, any dtype: the oracle"),
        Backend("chunked", "pure PyTorch, memory linear in the length: serves every call"),
        Backend("sdpa", "PyTorch's own, where nothing is added to the scores"),
        Backend("triton", "fused kernels: static biases, FIRE, DAPE and talking heads", no_triton),
        Backend(
            "cuda",
            "the same, heads of DAPE V1 mixed in CUDA: the fastest in half precision",
            no_cuda,
        ),
    )
}
# The ones that do not serve every call, the fastest first.
SPECIAL = ("sdpa", "cuda", "triton")


def select(backend: str, return_weights: bool = False, return_lse: bool = False) -> str:
    """Return the name of the backend for a call, or `auto` if the call itself decides.

    Raises:
        UserError: for an unknown backend, or one that cannot work here, saying why.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise unknown("backend", backend, ("auto", *BACKENDS))
    if return_weights and return_lse:
        raise UserError(
            "return_weights=True and return_lse=True: a call returns one of them; "
            "the log-sum-exp needs a call of its own"
        )
    if return_weights:
        if backend not in ("auto", "reference"):
            raise UserError(
                f"backend={backend!r} never holds the attention weights; "
                "return_weights needs 'reference' or 'auto'"
            )
        return "reference"
    reason = None if backend == "auto" else absent(backend)
    if reason is not None:
        raise UserError(f"backend={backend!r} does not work here: {reason}; use 'auto'")
    return backend


@torch.compiler.assume_constant_result
def absent(backend: str) -> str | None:
    """Return why a backend does not work here at all, or None."""
    return BACKENDS[backend].obstacle()


def order(device: str) -> list[str]:
    """Return the backends, on `cpu` or `cuda`, of which `auto` takes the first that serves a call.

    The fused kernels serve a GPU; their interpreter on a CPU is for tests.
    """
    names = SPECIAL if device == "cuda" else SPECIAL[:1]
    return [*(name for name in names if absent(name) is None), "chunked"]


def fastest(device: torch.device, obstacle: Callable[[str], str | None]) -> str:
    """Return the fastest backend for a call: the first without an `obstacle`."""
    return next(name for name in order(device.type) if obstacle(name) is None)


def devices() -> list[str]:
    """Return the devices PyTorch sees, by name."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *gpus]
