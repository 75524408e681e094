"""The kernels of a plan as one CUDA graph, for tensors that come back to the same addresses.

The host starts a graph about as fast as a kernel. In training, the allocator of PyTorch gives the
tensors of a layer the addresses of the step before, and all kernels of a call become one start.
"""

from collections import OrderedDict
from collections.abc import Callable
from ctypes import byref, c_void_p
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch.cuda import is_current_stream_capturing
from torch.cuda._utils import _check_cuda, _get_gpu_runtime_library

# Kernels of a call from which a graph pays, and the call with the same addresses that makes it.
FEWEST_KERNELS, OFTEN = 3, 3
# Graphs are kept for so many plans and addresses, the latest.
MOST_GRAPHS = 1024
# CU_STREAM_CAPTURE_MODE_RELAXED: other threads go on. CU_STREAM_NON_BLOCKING.
RELAXED, NON_BLOCKING = 2, 1
# CUDA_ERROR_OUT_OF_MEMORY: graphs need memory beside that of PyTorch, which may hold all there is.
OUT_OF_MEMORY = 2


class Graphs:
    """The graphs of all plans, by plan and addresses, or how often the addresses came so far."""

    def __init__(self) -> None:
        self.known: OrderedDict[tuple[int, ...], c_void_p | int] = OrderedDict()
        self._lock = Lock()

    def run(
        self,
        plan: int,
        addresses: tuple[int, ...],
        device: torch.device,
        begin: Callable[[int], None],
    ) -> bool:
        """Start the graph of a plan for some addresses, or return False if there is none.

        `begin` starts the kernels on a stream. Within a capture of the caller, or without memory
        for it, there is no graph.
        """
        if is_current_stream_capturing():
            return False
        with self._lock:
            graph = self._found((plan, *addresses), device, begin)
            if isinstance(graph, int):
                return False
            return _has_memory(driver().cuGraphLaunch(graph, c_void_p(current_stream(device))))

    def _found(
        self, key: tuple[int, ...], device: torch.device, begin: Callable[[int], None]
    ) -> c_void_p | int:
        """Return the graph of a key, or how often the key came."""
        graph = self.known.get(key, 0)
        if isinstance(graph, int):
            graph += 1
            if graph == OFTEN:
                graph = record(device, begin) or graph
            self.known[key] = graph
        self.known.move_to_end(key)
        if len(self.known) > MOST_GRAPHS:
            _, last = self.known.popitem(last=False)
            if not isinstance(last, int):
                _check_cuda(driver().cuGraphExecDestroy(last))
        return graph


GRAPHS = Graphs()


def record(device: torch.device, begin: Callable[[int], None]) -> c_void_p | None:
    """Return the executable graph of the kernels that `begin` starts, None for lack of memory."""
    stream, graph, executable = c_void_p(aside(device)), c_void_p(), c_void_p()
    _check_cuda(driver().cuStreamBeginCapture_v2(stream, RELAXED))
    try:
        begin(aside(device))
    finally:
        _check_cuda(driver().cuStreamEndCapture(stream, byref(graph)))
    made = _has_memory(driver().cuGraphInstantiateWithFlags(byref(executable), graph, 0))
    _check_cuda(driver().cuGraphDestroy(graph))
    return executable if made else None


def _has_memory(status: int) -> bool:
    """Return whether the driver had memory; any other error is raised."""
    if status != OUT_OF_MEMORY:
        _check_cuda(status)
    return status != OUT_OF_MEMORY


@cache
def driver() -> Any:
    """Return the library of the driver."""
    return _get_gpu_runtime_library()


@cache
def aside(device: torch.device) -> int:
    """Return a stream for captures, which never runs anything.

    Streams of PyTorch come from a pool, and another thread may use the same one.
    """
    stream = c_void_p()
    with torch.cuda.device(device):
        _check_cuda(driver().cuStreamCreate(byref(stream), NON_BLOCKING))
    return stream.value or 0


def current_stream(device: torch.device) -> int:
    """Return the current stream of a GPU, without the object that PyTorch makes for a user."""
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream
