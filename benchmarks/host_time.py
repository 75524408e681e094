"""The host's time for short calls of attention: by launchers, by plans, and by graphs of plans.

    python benchmarks/host_time.py [SCHEME ...] [--backend cuda] [--profile]

Microseconds by the wall clock of a call with 12 heads of 64: forward without gradients, forward and
backward at 1 x 64, and a query against a cache that grows by a key a call. On a GPU calls are in
bf16, and kernels take less time than the host at these sizes. On a CPU calls are in fp16, and every
kernel is a function that does nothing: launchers, allocations, PyTorch and Triton's look at the
arguments remain. `--profile` prints the functions of a forward and backward pass too.
"""

import argparse
import cProfile
import ctypes
import itertools
import pstats
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import dape
from dape.attention import select
from dape.attention.fused import plan, replay
from dape.bench.case import Case, Parts, build

SCHEMES = ("nope", "kerple", "dape-kerple", "dape-t5", "fire", "dape-fire", "dape3-kerple")
GPU = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if GPU else "cpu"), torch.bfloat16 if GPU else torch.float16
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt in malloc.h
FIRST_KEYS, CALLS, ROUNDS = 1024, 10, 40


class Nothing:
    """A compiled kernel of Triton that does nothing."""

    function = packed_metadata = None

    def nothing(self, *_: Any) -> None:
        """Do nothing."""

    launch_metadata = run = nothing


class Driver:
    """A driver whose functions do nothing."""

    def __getattr__(self, _: str) -> Callable[..., int]:
        """Return a function that succeeds."""
        return lambda *_: 0


def without_a_gpu() -> None:
    """Let calls on this CPU go the way of a GPU of compute capability 9.0, without any kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import jit
    from triton.runtime.driver import driver

    from dape.attention.fused.cuda import forward, launch, mix

    for threshold in (
        M_MMAP_THRESHOLD,
        M_TRIM_THRESHOLD,
    ):  # memory stays, as on GPUs
        ctypes.CDLL(None).mallopt(threshold, 2**30)

    def compiled(kernel: Any, key: str, _signature: Any, device: int, *_: Any) -> Nothing:
        cache = kernel.device_caches[device][0]
        cache[key] = Nothing()
        return cache[key]

    def get_current_target() -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=get_current_target,
        )
    )
    jit.JITFunction._do_compile = compiled
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=8)
    torch.cuda.current_device = lambda: 0
    torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)
    launch.launcher = lambda: lambda *_: 0
    launch._check_cuda = lambda _: None
    for module in (forward, mix):
        module.kernel = lambda *_, **__: launch.Kernel(None, 0)
    select.missing = lambda _: None
    select.order = lambda _: list(select.BACKENDS)
    plan.DEVICES = ("cpu",)
    plan.current_stream = replay.current_stream = replay.aside = lambda device: 0
    replay.is_current_stream_capturing = lambda: False
    replay.driver = Driver


def calls_of(parts: Parts, backend: str) -> dict[str, Callable[[], object]]:
    """Return the timed calls by name."""
    parameters = list(parts.named_parameters.values())

    def drawn(length: int) -> Tensor:
        return torch.randn(1, 12, length, 64, device=DEVICE, dtype=DTYPE)

    query, key, value, weight = (drawn(64) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    one, cache = drawn(1), drawn(FIRST_KEYS + ROUNDS * (CALLS + 1) * 2)
    lengths = itertools.count(FIRST_KEYS)

    def attend(*qkv: Tensor, **options: int) -> Tensor:
        return dape.attention(*qkv, parts.bias, parts.adapter, backend=backend, **options)

    def forward() -> None:
        with torch.no_grad():
            attend(query, key, value)

    def both() -> None:
        torch.autograd.grad(attend(*leaves), [*leaves, *parameters], weight)

    def decode() -> None:
        keys = next(lengths)
        with torch.no_grad():
            attend(one, cache[:, :, :keys], cache[:, :, :keys], query_offset=keys - 1)

    return {"forward": forward, "forward + backward": both, "decode": decode}


def microseconds(call: Callable[[], object]) -> float:
    """Return the time of a call, the shortest of several rounds."""
    found = []
    for _ in range(ROUNDS):
        call()
        wait()
        begun = time.perf_counter()
        for _ in range(CALLS):
            call()
        wait()
        found.append(1e6 * (time.perf_counter() - begun) / CALLS)
    return min(found)


def wait() -> None:
    """Wait for the GPU, if there is one."""
    if GPU:
        torch.cuda.synchronize()


def profiled(call: Callable[[], object]) -> None:
    """Print the functions in which a call spends the most time."""
    recorded = cProfile.Profile()
    recorded.enable()
    for _ in range(CALLS):
        call()
    recorded.disable()
    found = pstats.Stats(recorded)
    print(f"{found.total_calls / CALLS:.0f} calls of functions a call of attention")
    found.sort_stats("tottime").print_stats(25)


def main() -> None:
    """Print a line for each scheme and call."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schemes", nargs="*", default=SCHEMES, metavar="SCHEME")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    if not GPU:
        torch.set_num_threads(1)
        without_a_gpu()
    devices = plan.DEVICES
    often = replay.OFTEN
    print(f"{'microseconds a call':34} {'without plans':>14} {'with plans':>12} {'as graphs':>12}")
    for scheme in given.schemes:
        parts = build(Case(scheme, 12, 64, 64, 1, "bf16", DEVICE, 0))
        for name, call in calls_of(parts, given.backend).items():
            plan.DEVICES, replay.OFTEN = (), sys.maxsize
            times = [microseconds(call)]
            plan.DEVICES = devices
            times.append(microseconds(call))
            replay.OFTEN = often
            plan.GRAPHS = replay.Graphs()
            times.append(microseconds(call))
            print(
                f"{scheme:14} {name:19} {times[0]:14.0f} {times[1]:12.0f} {times[2]:12.0f}",
                flush=True,
            )
            if given.profile:
                profiled(call)


if __name__ == "__main__":
    main()
