"""The kernels of a call as a list, made once for all calls of the same sizes.

A launcher computes a grid and about forty numbers for a kernel, and the host needs longer for them
than a short kernel runs. Grids and numbers follow from sizes. `plan_of` therefore runs launchers on
tensors without memory, and notes the kernels in a `Plan`. Later calls allocate results and a common
workspace, and start the compiled kernels with addresses.
"""

import threading
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dape.attention.fused.overlap import chained
from dape.attention.fused.replay import FEWEST_KERNELS, GRAPHS, current_stream
from dape.attention.fused.sizes import cdiv

# Where plans are made; Triton's interpreter on a CPU compiles nothing.
DEVICES = ("cuda",)
# Kernels of a plan. Longer calls wait for the GPU, not for the host.
MOST_KERNELS = 512
# Bytes. Kernels with a plan take tensors at multiples.
ALIGNMENT = 16
# Memory is given out in multiples of so many bytes, as by PyTorch.
_PIECE = 512
_ALLOCATIONS = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}


_numbers = count()

# Shape, strides and dtype of a tensor.
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True)
class Pointer:
    """The dtype and address of a tensor, for which a kernel is compiled."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        """Return the address from the start of a tensor, as divisible as the whole address."""
        return self.address


class Start(NamedTuple):
    """A kernel on a grid, and the arguments, of which the first is the stream.

    `places` lists the arguments that are addresses, by place, number of the tensor, and bytes from
    the start of the tensor. Numbers count the given tensors, the results, and the workspace.
    """

    kernel: Callable[..., None]
    arguments: list[Any]
    places: list[tuple[int, int, int]]


class Plan(NamedTuple):
    """The kernels of a call in order, the results, and the bytes of the workspace between.

    `number` tells plans apart. Kernels for the same addresses become a graph.
    """

    starts: list[Start]
    results: list[Layout]
    workspace: int
    number: int

    def run(self, addresses: list[int], device: torch.device) -> list[Tensor]:
        """Return the results for tensors at some addresses."""
        found = [empty(layout, device) for layout in self.results]
        addresses = [*addresses, *[x.data_ptr() for x in found]]
        if self.workspace:
            workspace = empty(((self.workspace,), (1,), torch.uint8), device)
            addresses.append(workspace.data_ptr())
        begin = partial(self._begin, addresses)
        several = len(self.starts) >= FEWEST_KERNELS
        if not (several and GRAPHS.run(self.number, tuple(addresses), device, begin)):
            begin(current_stream(device))
        return found

    def _begin(self, addresses: list[int], stream: int) -> None:
        """Start the kernels on a stream."""
        for kernel, arguments, places in self.starts:
            arguments = arguments.copy()
            arguments[0] = stream
            for place, piece, offset in places:
                arguments[place] = addresses[piece] + offset
            kernel(*arguments)


class _Recorder(TorchDispatchMode):
    """Notes kernels that are started; raises `NotImplementedError` for any other computation."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, tuple[int, ...], list[Any], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not (operation.is_view or operation.overloadpacket in _ALLOCATIONS):
            raise NotImplementedError(operation)
        return operation(*args, **(kwargs or {}))

    def note(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Note the start of a kernel, with its arguments in order."""
        if len(self.noted) == MOST_KERNELS:
            raise NotImplementedError("a call of many bands")
        arguments = [*args, *(options.pop(name) for name in kernel.arg_names[len(args) :])]
        self.noted.append((kernel, grid, arguments, options))


class _Current(threading.local):
    """The recorder of this thread."""

    recorder: _Recorder | None = None


_current = _Current()


def start(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Return the function that starts a kernel on a grid, or notes the start for a plan."""
    recorder = _current.recorder
    begin = kernel[grid] if recorder is None else partial(recorder.note, kernel, grid)
    return partial(begin, **chained(kernel))


def planned(
    function: Callable[..., Sequence[Tensor]],
    given: Sequence[Tensor | None],
    *how: Any,
    once: bool = False,
) -> Sequence[Tensor]:
    """Return the results of a function of tensors and numbers, by a plan if possible.

    The second call of the same sizes makes the plan. Sizes of decoding come `once` and get no plan,
    nor does a function that computes otherwise than by kernels that `start` starts.
    """
    like = next(x for x in given if x is not None)
    device = like.device
    with torch.cuda.device_of(like):
        if once or device.type not in DEVICES:
            return function(given, *how)
        addresses = [0 if x is None else x.data_ptr() for x in given]
        if any([address % ALIGNMENT for address in addresses]):
            return function(given, *how)
        layouts = tuple([None if x is None else layout_of(x) for x in given])
        calls = calls_of(function, layouts, device, *how)
        calls.number += 1
        if calls.number == 2:
            calls.plan = plan_of(function, layouts, *how)
        if calls.plan is None:
            return function(given, *how)
        return calls.plan.run(addresses, device)


def layout_of(x: Tensor) -> Layout:
    """Return the layout of a tensor."""
    return x.shape, x.stride(), x.dtype


def empty(layout: Layout, device: torch.device | str) -> Tensor:
    """Return a tensor of a layout."""
    shape, strides, dtype = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


@dataclass(slots=True)
class _Calls:
    """How many calls of some sizes there were, and their plan."""

    number: int = 0
    plan: Plan | None = None


@lru_cache(maxsize=512)
def calls_of(*sizes: Any) -> _Calls:
    """Return the calls of some sizes."""
    return _Calls()


def plan_of(
    function: Callable[..., Sequence[Tensor]], layouts: Sequence[Layout | None], *how: Any
) -> Plan | None:
    """Return the plan of a function for tensors of some sizes, or None if it has none."""
    given = [None if layout is None else empty(layout, "meta") for layout in layouts]
    recorder = _Recorder()
    _current.recorder = recorder
    try:
        with recorder:
            results = function(given, *how)
    except NotImplementedError:
        return None
    finally:
        _current.recorder = None
    outside = [*given, *results]
    memory = {_memory_of(x): (n, 0) for n, x in enumerate(outside) if x is not None}
    if len(memory) < sum(x is not None for x in outside):
        return None  # a result is an argument
    offsets, size = _packed(_lives(recorder.noted, memory))
    memory |= {key: (len(outside), offset) for key, offset in offsets.items()}
    starts = []
    for kernel, grid, arguments, options in recorder.noted:
        places = []
        for n, x in enumerate(arguments):
            if isinstance(x, Tensor):
                piece, begin = memory[_memory_of(x)]
                places.append((n, piece, begin + int(x.storage_offset()) * x.itemsize))
                arguments[n] = Pointer(x.dtype, places[-1][2])
        run, first = prepared(kernel, grid, arguments, options)
        places = [(len(first) + n, piece, offset) for n, piece, offset in places]
        starts.append(Start(run, [*first, *arguments], places))
    return Plan(starts, [layout_of(x) for x in results], size, next(_numbers))


def _memory_of(x: Tensor) -> int:
    """Return a number for the memory of a tensor, equal for views."""
    return x.untyped_storage()._cdata


class _Life(NamedTuple):
    """The bytes of a tensor in the workspace, and the first and last kernel that use the tensor."""

    size: int
    first: int
    last: int


def _lives(noted: Sequence[Any], outside: Container[int]) -> dict[int, _Life]:
    """Return the lives of all tensors of the kernels that are not `outside`."""
    found: dict[int, _Life] = {}
    for n, (_, _, arguments, _) in enumerate(noted):
        for x in arguments:
            if isinstance(x, Tensor) and (key := _memory_of(x)) not in outside:
                size = cdiv(x.untyped_storage().nbytes(), _PIECE) * _PIECE
                found[key] = found.get(key, _Life(size, n, n))._replace(last=n)
    return found


def _packed(lives: dict[int, _Life]) -> tuple[dict[int, int], int]:
    """Return places in a workspace, found for the largest tensor first, and the size in bytes.

    Tensors whose lives do not overlap may share a place.
    """
    places: dict[int, int] = {}
    for key, life in sorted(lives.items(), key=lambda item: -item[1].size):
        place = 0
        for other, begin in sorted(places.items(), key=lambda item: item[1]):
            there = lives[other]
            meets = there.first <= life.last and life.first <= there.last
            if meets and begin < place + life.size and place < begin + there.size:
                place = begin + there.size
        places[key] = place
    return places, max((place + lives[key].size for key, place in places.items()), default=0)


def prepared(
    kernel: Any, grid: tuple[int, ...], arguments: list[Any], options: dict[str, Any]
) -> tuple[Callable[..., None], list[Any]]:
    """Return the function that starts a compiled kernel, and what goes before the arguments.

    The function is the launcher that Triton calls too, without hooks of a profiler.
    """
    whole = (*grid, 1, 1)[: max(3, len(grid))]
    compiled = kernel.warmup(*arguments, grid=whole, **options)
    run = partial(compiled.run, *whole)  # loads the kernel
    return run, [0, compiled.function, compiled.packed_metadata, None, None, None]
