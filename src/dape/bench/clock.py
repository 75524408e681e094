"""Time and memory of a call: medians, after warm-up, over rotating inputs.

On a GPU calls whose speed the host limits are timed inside a CUDA graph.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle, islice, pairwise
from statistics import median
from typing import NamedTuple

import torch
from torch._C._autograd import DeviceType

from dape.bench.attempt import reason_of, release
from dape.device import waiting_forbidden

Call = Callable[[], object]

BUDGET = 1000.0  # milliseconds of all measured runs
FEWEST, MOST = 3, 100  # runs
# Milliseconds of a call always captured, and of a graph; calls in a graph.
CAPTURED_BELOW, GRAPH, MOST_CALLS = 60.0, 5.0, 32
GRAPHED, EVENTS, WALL = "CUDA graph", "CUDA events", "wall clock"


class Timing(NamedTuple):
    """Milliseconds of a call in each run, calls of a run, the clock, and bytes at the peak.

    Beside a time inside a CUDA graph, `eager` is the time of a call outside, by the wall clock.
    `launches` is the number of kernels and copies started by the host.
    """

    milliseconds: list[float]
    calls: int
    clock: str
    peak: int | None = None
    eager: float | None = None
    launches: int | None = None

    @property
    def median(self) -> float:
        """Return the median of the runs."""
        return median(self.milliseconds)


def measure(calls: Sequence[Call], device: torch.device) -> Timing:
    """Return the timing of calls that differ only in inputs."""
    calls[0]()  # compiles, tunes, loads libraries
    return on_gpu(calls) if device.type == "cuda" else Timing(wall_times(calls), 1, WALL)


def by_wall_clock(call: Call, device: torch.device) -> Timing:
    """Return the timing of a call and of waiting for its result, as a person meets it."""
    call()
    if device.type != "cuda":
        return Timing(wall_times([call]), 1, WALL)
    peak, _ = peak_and_time(call)
    return Timing(wall_times([call], torch.cuda.synchronize), 1, WALL, peak)


def wall_times(calls: Sequence[Call], wait: Call = lambda: None) -> list[float]:
    """Return the milliseconds of runs within the budget by the wall clock."""
    found: list[float] = []
    for call in islice(cycle(calls), MOST):
        begun = time.perf_counter()
        call()
        wait()
        found.append(1000 * (time.perf_counter() - begun))
        if len(found) >= FEWEST and sum(found) >= BUDGET:
            break
    return found


def on_gpu(calls: Sequence[Call]) -> Timing:
    """Return the timing of a graph of calls, or of separate calls if long."""
    peak, once = peak_and_time(calls[0])
    turns = cycle(calls)

    def turn() -> object:
        return next(turns)()

    if once >= BUDGET:
        return Timing([once, *event_times(turn, FEWEST - 1)], 1, EVENTS, peak)
    once = median(event_times(turn, 2 * len(calls)))
    clock = EVENTS
    if once < CAPTURED_BELOW or host_time(turn) > once / 2:
        rounds = max(1, min(MOST_CALLS, round(GRAPH / once)) // len(calls))
        graphed = rounds * list(calls)
        graph = capture(graphed)
        if not isinstance(graph, str):
            found = repeated(graph.replay)
            graph.reset()
            runs = [run / len(graphed) for run in found]
            few = max(1, min(10, int(BUDGET / 10 / once)))
            eager = eager_time(turn, calls=few)
            return Timing(runs, len(graphed), GRAPHED, peak, eager, launches(turn))
        clock = f"{EVENTS} without a graph ({graph})"
    return Timing(repeated(turn), 1, clock, peak)


def host_time(run: Call) -> float:
    """Return the milliseconds until the host has started a run, without waiting for the end."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    started = 1000 * (time.perf_counter() - begun)
    torch.cuda.synchronize()
    return started


def eager_time(run: Call, calls: int, rounds: int = 5) -> float:
    """Return the milliseconds of a run by the wall clock, the median of rounds of several."""
    found = []
    for _ in range(rounds + 1):  # the first warms up
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - begun) / calls)
    return median(found[1:])


def launches(run: Call) -> int:
    """Return the number of kernels and copies that a run starts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as recorded:
        run()
        torch.cuda.synchronize()
    events = recorded.key_averages()
    return sum(event.count for event in events if event.device_type == DeviceType.CUDA)


def peak_and_time(call: Call) -> tuple[int, float]:
    """Return the additional bytes of a call, results included, and the time of the call."""
    torch.cuda.synchronize()
    release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (once,) = event_times(call, 1)
    return torch.cuda.max_memory_allocated() - before, once


def event_times(run: Call, count: int) -> list[float]:
    """Return the milliseconds between events around consecutive runs."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


def repeated(run: Call) -> list[float]:
    """Return the milliseconds of runs within the budget, after a warm-up run."""
    once = event_times(run, 2)[1]
    return event_times(run, max(FEWEST, min(MOST, int(BUDGET / once))))


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph | str:
    """Return a graph of the calls, or the reason against a graph.

    A call that waits for the GPU is detected before the capture.
    """
    current, side = torch.cuda.current_stream(), side_stream()
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            calls[0]()  # libraries allocate workspaces for a stream
            with waiting_forbidden():
                calls[0]()
        current.wait_stream(side)
        release()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for call in calls:
                call()
    except Exception as error:  # a kernel may do anything that a capture forbids
        return reason_of(error)
    finally:
        torch.cuda.set_stream(current)  # a failed capture stays on the side stream
        torch.cuda.synchronize()
    return graph


@cache
def side_stream() -> torch.cuda.Stream:
    """Return the stream of all captures, because libraries never free workspaces of a stream."""
    return torch.cuda.Stream()
