"""Kernels that start while the kernel before still runs, and wait on the GPU for its results.

The start of a kernel takes a microsecond or two, in which the GPU would be idle. Every kernel waits
before it reads or writes memory (`tiles.follow`, `follow` in ptx.cuh). The order of all effects is
that of kernels one after the other.
"""

from ctypes import byref, c_int
from functools import cache
from typing import Any

import torch
from torch.cuda._utils import _check_cuda, _get_gpu_runtime_library

# The least CUDA of a driver that captures overlapping kernels in graphs, and the least compute
# capability, that of Hopper.
DRIVER, CAPABILITY = 12030, (9, 0)


def chained(kernel: Any) -> dict[str, bool]:
    """Return the options of a kernel of Triton that may start while the kernel before runs."""
    from triton.runtime.jit import JITFunction

    if "CHAINED" not in kernel.arg_names:
        return {}
    able = isinstance(kernel, JITFunction) and overlaps()
    return {"CHAINED": True, "launch_pdl": True} if able else {"CHAINED": False}


def overlaps() -> bool:
    """Return whether kernels may overlap on the current GPU."""
    return _has_gpu() and _capable(torch.cuda.current_device())


_has_gpu = cache(lambda: torch.cuda.is_available() and not torch.version.hip)


@cache
def _capable(device: int) -> bool:
    version = c_int()
    _check_cuda(_get_gpu_runtime_library().cuDriverGetVersion(byref(version)))
    return version.value >= DRIVER and torch.cuda.get_device_capability(device) >= CAPABILITY
