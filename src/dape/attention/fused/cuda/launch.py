"""CUDA kernels compiled when first used, by NVRTC, and started at little cost."""

from collections.abc import Callable
from ctypes import addressof, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from struct import pack
from typing import Any

import torch
from torch import Tensor
from torch.cuda._utils import _check_cuda, _get_gpu_runtime_library


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel on the device that was current at compilation, started as kernels of Triton are.

    Kernels of `torch.cuda._compile_kernel` look at every argument at every call, in 0.2 ms, longer
    than many a kernel runs. `Kernel` turns an argument into a word of eight bytes.
    """

    function: c_void_p
    packed_metadata: int
    arg_names: tuple[str, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return the function that starts the kernel, for three sizes of a grid, and of a block."""
        stream = torch.cuda.current_stream().cuda_stream
        return partial(self.run, *grid, stream, self.function, self.packed_metadata, *[None] * 3)

    def warmup(self, *args: Any, grid: tuple[int, ...]) -> "Kernel":
        """Return the kernel, which is compiled."""
        return self

    def run(self, *given: Any) -> None:
        """Start the kernel with `int` for integers, `double` for floats.

        Arguments follow six sizes, stream, function, bytes of shared memory, and three of Triton.
        """
        sizes, (stream, function, shared_memory), args = given[:6], given[6:9], given[12:]
        words = (c_uint64 * len(args))(*map(word, args))
        first = addressof(words)
        places = (c_void_p * len(args))(*range(first, first + 8 * len(args), 8))
        _check_cuda(launcher()(function, *sizes, shared_memory, c_void_p(stream), places, None))


@cache
def launcher() -> Callable[..., int]:
    """Return the function of the driver for starting a kernel."""
    function: Callable[..., int] = _get_gpu_runtime_library().cuLaunchKernel
    return function


def word(argument: Tensor | int | float) -> int:
    """Return an argument as the low bytes of a word."""
    if isinstance(argument, int):
        return argument
    if isinstance(argument, float):
        return int.from_bytes(pack("=d", argument), "little")
    return argument.data_ptr()


def source_of(defines: dict[str, int], *names: str) -> str:
    """Return the named sources of the folder, after some macros and `ptx.cuh`."""
    folder = files("dape.attention.fused.cuda")
    texts = (folder.joinpath(name).read_text() for name in ("ptx.cuh", *names))
    return "\n".join([*(f"#define {name} {value}" for name, value in defines.items()), *texts])


def kernel(source: str, name: str, capability: str | None = None, shared_memory: int = 0) -> Kernel:
    """Return a compiled kernel with some bytes of dynamic shared memory, on the current device."""
    found = torch.cuda._compile_kernel(source, name, compute_capability=capability)
    if shared_memory:
        found.set_shared_memory_config(shared_memory)
    return Kernel(found.func, shared_memory)
