"""CUDA kernels compiled when first used, by NVRTC, and started at little cost.

A compiled kernel is kept in Triton's cache on the disk, for later processes.
"""

from collections.abc import Callable
from ctypes import Structure, addressof, byref, c_int, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from struct import pack
from typing import Any

import torch
from torch import Tensor
from torch.cuda import _utils
from torch.cuda._utils import _check_cuda, _get_gpu_runtime_library
from triton.runtime.cache import get_cache_manager

from dape.attention.fused.overlap import overlaps


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel on the device that was current at compilation, started as kernels of Triton are.

    Kernels of `torch.cuda._utils` look at every argument at every call, in 0.2 ms, longer
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
        how = Launch(*sizes, shared_memory, stream, addressof(_OVERLAP), overlaps())
        _check_cuda(launcher()(byref(how), function, places, None))


class Attribute(Structure):
    """`CUlaunchAttribute` of the driver; the value is a union of 64 bytes."""

    _fields_ = (("id", c_int), ("padding", c_int), ("value", c_int), ("rest", c_int * 15))


class Launch(Structure):
    """`CUlaunchConfig` of the driver."""

    _fields_ = (
        *((f"{what}_{axis}", c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_memory", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("number", c_uint),
    )


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: `follow` in the kernel waits instead.
_OVERLAP = Attribute(id=6, value=1)


@cache
def launcher() -> Callable[..., int]:
    """Return the function of the driver for starting a kernel."""
    function: Callable[..., int] = _get_gpu_runtime_library().cuLaunchKernelEx
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
    binary = compiled(source, name, capability or device_capability())
    loaded: Any = _utils._cuda_load_module(binary, [name])
    found = loaded[name]
    if shared_memory:
        found.set_shared_memory_config(shared_memory)
    return Kernel(found.func, shared_memory)


def device_capability() -> str:
    """Return the compute capability of the current device, as 90."""
    return "".join(map(str, torch.cuda.get_device_capability()))


def compiled(source: str, name: str, capability: str) -> bytes:
    """Return the machine code of a kernel of C linkage, from the cache or by NVRTC."""
    told = source, name, capability, torch.__version__, torch.version.cuda
    cached = get_cache_manager(sha256(repr(told).encode()).hexdigest())
    file = cached.get_file(f"{name}.cubin")
    if file is not None:
        return Path(file).read_bytes()
    binary, _ = _utils._nvrtc_compile(source, name, capability)
    cached.put(binary, f"{name}.cubin")
    return binary
