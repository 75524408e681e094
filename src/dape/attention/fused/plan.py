"""The kernels of a call as a list, made once for all calls of the same sizes.

A launcher works out a grid and some forty numbers for a kernel, which takes the host longer than a
short kernel runs. All of them follow from sizes. A plan is what the launchers start for tensors
without memory. It is run by giving out memory, and by starting the kernels with its addresses.
"""

import threading
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dape.attention.fused.sizes import cdiv

# Where plans are made; Triton's interpreter on a CPU compiles nothing.
DEVICES = ("cuda",)
# Memory is given out in multiples of so many bytes, as by PyTorch.
_PIECE = 512
_ALLOCATIONS = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}


class Layout(NamedTuple):
    """The sizes of a tensor whose first number is at a multiple of 16 bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> "Layout":
        """Return that of a tensor."""
        return cls(x.shape, x.stride(), x.dtype)

    def empty(self, device: torch.device | str) -> Tensor:
        """Return a tensor of these sizes."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


@dataclass(frozen=True, slots=True)
class Pointer:
    """A tensor as far as a kernel is compiled for it."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        """Return the address, or one that is as divisible."""
        return self.address


class Start(NamedTuple):
    """A kernel on its grid, and its arguments.

    `places` tells which arguments are addresses: the place of each, the number of the tensor that
    holds it, and the bytes from the begin of that tensor.
    """

    kernel: Callable[..., None]
    arguments: list[Any]
    places: list[tuple[int, int, int]]


class Plan(NamedTuple):
    """The kernels of a call in order, the results, and the bytes of all that is between."""

    starts: list[Start]
    results: list[Layout]
    workspace: int

    def run(self, given: Sequence[Tensor | None], device: torch.device) -> list[Tensor]:
        """Return the results for tensors of the sizes that the plan was made for."""
        found = [layout.empty(device) for layout in self.results]
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        pieces = (*given, *found, workspace)
        addresses = [0 if x is None else x.data_ptr() for x in pieces]
        stream = current_stream(device)
        for kernel, arguments, places in self.starts:
            arguments = arguments.copy()
            for place, piece, offset in places:
                arguments[place] = addresses[piece] + offset
            kernel(*arguments, stream=stream)
        return found


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
        arguments = [*args, *(options.pop(name) for name in kernel.arg_names[len(args) :])]
        self.noted.append((kernel, grid, arguments, options))


class _Current(threading.local):
    """The recorder of this thread."""

    recorder: _Recorder | None = None


_current = _Current()


def start(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Return the function that starts a kernel on a grid, or notes it while a plan is made."""
    if _current.recorder is None:
        found: Callable[..., None] = kernel[grid]
        return found
    return partial(_current.recorder.note, kernel, grid)


def planned(
    function: Callable[..., Sequence[Tensor]],
    given: Sequence[Tensor | None],
    *how: Any,
    once: bool = False,
) -> Sequence[Tensor]:
    """Return what a function makes of tensors and numbers, by a plan if there is one.

    The second call of the same sizes makes one, unless they come but `once`, as in decoding. The
    function must compute by kernels alone, which it starts by `start`.
    """
    like = next(x for x in given if x is not None)
    with torch.cuda.device_of(like):
        if not once and like.device.type in DEVICES and all(map(_aligned, given)):
            layouts = tuple([None if x is None else Layout.of(x) for x in given])
            calls = calls_of(function, layouts, like.device, *how)
            calls.number += 1
            if calls.number == 2:
                calls.plan = plan_of(function, layouts, *how)
            if calls.plan is not None:
                return calls.plan.run(given, like.device)
        return function(given, *how)


def _aligned(x: Tensor | None) -> bool:
    """Return whether a tensor begins where kernels with a plan want it."""
    return x is None or x.data_ptr() % 16 == 0


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
    given = [None if layout is None else layout.empty("meta") for layout in layouts]
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
        for place, x in enumerate(arguments):
            if isinstance(x, Tensor):
                piece, begin = memory[_memory_of(x)]
                places.append((place, piece, begin + int(x.storage_offset()) * x.itemsize))
                arguments[place] = Pointer(x.dtype, places[-1][2])
        starts.append(Start(prepared(kernel, grid, arguments, options), arguments, places))
    return Plan(starts, [Layout.of(x) for x in results], size)


def _memory_of(x: Tensor) -> int:
    """Return what tells the memory of a tensor from that of others."""
    return x.untyped_storage()._cdata


class _Life(NamedTuple):
    """The bytes of what lies in the workspace, and the first and last kernel that use it."""

    size: int
    first: int
    last: int


def _lives(noted: Sequence[Any], outside: Container[int]) -> dict[int, _Life]:
    """Return what the kernels use that is not `outside`."""
    found: dict[int, _Life] = {}
    for n, (_, _, arguments, _) in enumerate(noted):
        for x in arguments:
            if isinstance(x, Tensor) and (key := _memory_of(x)) not in outside:
                size = cdiv(x.untyped_storage().nbytes(), _PIECE) * _PIECE
                found[key] = found.get(key, _Life(size, n, n))._replace(last=n)
    return found


def _packed(lives: dict[int, _Life]) -> tuple[dict[int, int], int]:
    """Return the place of each of some lives in a workspace, and its size; the largest come first.

    Those that no kernel finds at the same time may have the same place.
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
) -> Callable[..., None]:
    """Return the function that starts a kernel on a grid, compiled for such arguments."""
    whole = (*grid, 1, 1)[: max(3, len(grid))]
    found: Callable[..., None] = kernel.warmup(*arguments, grid=whole, **options)[whole]
    return found


def current_stream(device: torch.device) -> int:
    """Return the current stream of a GPU."""
    return torch.cuda.current_stream(device).cuda_stream
