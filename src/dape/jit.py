"""Kernels of Triton that the host starts: a compiled kernel is found by a short key.

Triton looks at all arguments, options, globals and environment variables whenever it starts a
kernel, and so takes longer than many a kernel runs. Here the arguments alone make a key. Triton
compiles and starts the kernel of a new key. The compiled kernel of a known key starts at once.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction


class Started:
    """A kernel of Triton, which the host starts as Triton's own: `kernel[grid](*args, **options)`.

    Args:
        function: the kernel.
        device: returns the index of the device on which kernels start.
    """

    def __init__(
        self, function: Any, device: Callable[[], int] = torch.cuda.current_device
    ) -> None:
        self.function, self.device = function, device
        self.names = [each.name for each in function.params]
        self.runtime = [not each.is_constexpr for each in function.params]
        self.kept = {name for name, own in zip(self.names, self.runtime, strict=True) if own}
        self.defaults = {each.name: each.default for each in function.params if each.has_default}
        self.compiled: dict[Hashable, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """Return any other property of Triton's kernel."""
        return getattr(self.function, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return the function that starts the kernel on a grid."""
        return partial(self.start, grid)

    def start(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Start the kernel; options are arguments by name, and Triton's own such as num_warps."""
        key = (
            self.device(),
            *map(kind, args, self.runtime),
            *((name, kind(value, name in self.kept)) for name, value in options.items()),
        )
        known = self.compiled.get(key)
        if known is None:
            self.compiled[key] = self.function[grid](*args, **options)
            return
        behind = self.names[len(args) :]
        named = [options[name] if name in options else self.defaults[name] for name in behind]
        known[(*grid, 1, 1)[:3]](*args, *named)


def kind(argument: Any, runtime: bool) -> Hashable:
    """Return a part of the key; arguments of one kind have the same compiled kernel.

    Triton compiles for the value of a constant, for the dtype of a tensor and whether it begins at
    a multiple of 16 bytes, and for an integer's width and whether it is 1 or a multiple of 16.
    """
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if runtime and type(argument) is int:
        bits = (argument if argument >= 0 else ~argument).bit_length()
        return argument == 1, argument % 16 == 0, bits // 32
    return type(argument), None if runtime and type(argument) is float else argument


def started(kernel: Any) -> Any:
    """Return a kernel of `triton.jit` with quick starts; the interpreter's stays as it is."""
    return Started(kernel) if isinstance(kernel, JITFunction) else kernel
