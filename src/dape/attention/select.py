"""The choice of the backend for a call, and reasons against backends."""

import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from dape.attention import chunked, cuda, reference, sdpa, triton
from dape.attention.call import Attended, Call
from dape.device import has_triton
from dape.errors import UserError, unknown


@runtime_checkable
class Module(Protocol):
    """A module that computes calls."""

    def obstacle(self, call: Call) -> str | None:
        """Return the reason against serving a call, or None."""

    def attend(self, call: Call, lse: bool = False) -> Attended:
        """Return the result of a call without obstacle, with `lse` also the log-sum-exp."""


class Backend(NamedTuple):
    """A way to compute attention.

    Args:
        module: the functions `obstacle` and `attend`.
        purpose: the purpose, for `dape info`.
        absent: function that returns the reason against use on this machine, or None.
        gives: results beside the output, of `lse` and `weights`.
        gpu_only: whether `auto` takes the backend on a GPU alone.
    """

    module: Module
    purpose: str
    absent: Callable[[], str | None] = lambda: None
    gives: tuple[str, ...] = ("lse",)
    gpu_only: bool = False


def no_gpu() -> str | None:
    """Return the reason why PyTorch has no CUDA GPU, or None."""
    if torch.cuda.is_available():
        return None
    return "no CUDA GPU" if torch.version.cuda else "this PyTorch is built without CUDA"


def no_triton() -> str | None:
    """Return the reason against Triton's kernels, or None, also under the interpreter."""
    if not has_triton():
        return "triton is not installed"
    return None if os.environ.get("TRITON_INTERPRET") == "1" else no_gpu()


def no_cuda() -> str | None:
    """Return the reason against kernels compiled at run time, or None."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return no_gpu() or no_triton()


# The fastest first: `auto` takes the first backend that serves a call.
BACKENDS = {
    "sdpa": Backend(sdpa, "PyTorch's own attention, without bias and adapter", gives=()),
    "cuda": Backend(
        cuda,
        "as triton, with DAPE, DAPE V2 and FIRE in CUDA, the fastest in half precision",
        no_cuda,
        gpu_only=True,
    ),
    "triton": Backend(
        triton,
        "fused kernels: static biases, FIRE, DAPE and talking heads",
        no_triton,
        gpu_only=True,
    ),
    "chunked": Backend(chunked, "every call, in pure PyTorch, memory linear in the length"),
    "reference": Backend(
        reference,
        "every call, whole score matrices, any dtype, for tests",
        gives=("lse", "weights"),
    ),
}
NOT_GIVEN = {
    "lse": "it returns no log-sum-exp",
    "weights": "it never holds the attention weights",
}


def select(call: Call, backend: str = "auto", wanted: str | None = None) -> Module:
    """Return the backend of a call, by name or the fastest that serves the call.

    `wanted` is the result beside the output, `lse` or `weights`.

    Raises:
        UserError: for an unknown backend, or a backend that cannot serve the call, with the reason.
    """
    if backend == "auto":
        names = order(call.query.device.type)
        backend = next(name for name in names if obstacle(name, call, wanted) is None)
        return BACKENDS[backend].module
    check_backend(backend)
    reason = obstacle(backend, call, wanted)
    if reason is not None:
        raise UserError(f"backend={backend!r} cannot serve this call: {reason}; use 'auto'")
    return BACKENDS[backend].module


def obstacle(backend: str, call: Call, wanted: str | None) -> str | None:
    """Return the reason against a backend for a call, or None."""
    if wanted is not None and wanted not in BACKENDS[backend].gives:
        return NOT_GIVEN[wanted]
    return BACKENDS[backend].module.obstacle(call)


def check_backend(backend: str) -> None:
    """Raise a `UserError` for a backend that is unknown or does not work on this machine."""
    if backend == "auto":
        return
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise unknown("backend", str(backend), ("auto", *BACKENDS))
    reason = absent(backend)
    if reason is not None:
        raise UserError(f"backend={backend!r} does not work here: {reason}; use 'auto'")


def absent(backend: str) -> str | None:
    """Return the reason against a backend on this machine, or None."""
    if torch.compiler.is_compiling():
        from dape.constant import constant

        return constant(BACKENDS[backend].absent)
    return missing(backend)


@cache
def missing(backend: str) -> str | None:
    """Return the same; to ask PyTorch for GPUs at each call takes the host too long."""
    return BACKENDS[backend].absent()


def order(device: str) -> list[str]:
    """Return the candidates of `auto` on a device, `cpu` or `cuda`.

    Fused kernels are for a GPU, and their interpreter on a CPU is for tests.
    """
    on_gpu = device == "cuda"
    names = [name for name, backend in BACKENDS.items() if on_gpu or not backend.gpu_only]
    return [name for name in names if absent(name) is None]


def devices() -> list[str]:
    """Return the devices of PyTorch, by name."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *gpus]
