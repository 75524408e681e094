"""How calls are timed: what is repeated, divided and counted; no test asks how fast."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch

from dape.bench import clock
from dape.bench.clock import Timing, measure

CPU = torch.device("cpu")
MIB = 2**20


def calls(number, log):
    return [lambda n=n: log.append(n) for n in range(number)]


def test_the_wall_clock_rotates_over_the_inputs_after_a_warm_up(monkeypatch):
    ticks = count(0.0)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))  # a second a look
    monkeypatch.setattr(clock, "BUDGET", 7000)
    log = []
    timing = measure(calls(3, log), CPU)
    assert log == [0, 0, 1, 2, 0, 1, 2, 0]
    assert timing.milliseconds == [1000.0] * 7
    assert (timing.calls, timing.clock, timing.peak) == (1, "wall clock", None)


def test_long_calls_are_few_and_short_ones_not_endless(monkeypatch):
    for budget, runs in ((0, clock.FEWEST), (1e9, clock.MOST)):
        monkeypatch.setattr(clock, "BUDGET", budget)
        assert len(measure(calls(2, []), CPU).milliseconds) == runs


def test_the_median_is_that_of_the_runs():
    assert Timing([5.0, 1.0, 2.0], 1, "wall clock").median == 2.0


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose calls take `once` milliseconds, the host `host` of them; graphs are captured."""
    state = SimpleNamespace(once=1.0, host=0.1, log=[], captured=None, refused=None, eager=None)

    def event_times(run, number):
        found = []
        for _ in range(number):
            before = len(state.log)
            run()
            found.append(state.once * (len(state.log) - before))
        return found

    def capture(all_calls):
        state.captured = len(all_calls)
        replay = lambda: [call() for call in all_calls]  # noqa: E731
        return state.refused or SimpleNamespace(replay=replay, reset=lambda: None)

    monkeypatch.setattr(clock, "event_times", event_times)
    monkeypatch.setattr(clock, "peak_and_time", lambda call: (7, event_times(call, 1)[0]))
    monkeypatch.setattr(clock, "capture", capture)
    monkeypatch.setattr(clock, "host_time", lambda call: state.host)
    monkeypatch.setattr(
        clock, "eager_time", lambda call, calls: setattr(state, "eager", calls) or 2.5
    )
    monkeypatch.setattr(clock, "launches", lambda call: 9)
    return state


@pytest.mark.parametrize(("once", "captured"), [(1.0, 4), (0.01, 32), (3.0, 2), (19.0, 2)])
def test_a_graph_holds_whole_turns_and_its_time_is_shared_among_its_calls(gpu, once, captured):
    gpu.once = once
    timing = measure(calls(2, gpu.log), torch.device("cuda"))
    assert gpu.captured == captured == timing.calls
    assert timing.milliseconds == pytest.approx([once] * len(timing.milliseconds))
    assert timing[2:] == ("CUDA graph", 7, 2.5, 9)
    assert gpu.log.count(0) > gpu.log.count(1) > 0  # the first alone warms up and is weighed


def test_long_calls_are_timed_one_by_one(gpu):
    gpu.once, gpu.host = 100.0, 49.0
    timing = measure(calls(2, gpu.log), torch.device("cuda"))
    assert gpu.captured is None and timing.clock == "CUDA events" and timing.calls == 1
    assert timing.eager is timing.launches is None
    assert timing.milliseconds == [100.0] * 10  # a second


def test_a_long_call_that_the_host_limits_is_timed_in_a_graph(gpu):
    """Events around separate calls would time the host."""
    gpu.once, gpu.host = 100.0, 51.0
    timing = measure(calls(2, gpu.log), torch.device("cuda"))
    assert timing.clock == "CUDA graph" and timing.calls == gpu.captured == 2
    assert timing.milliseconds == [100.0] * 5 and gpu.eager == 1


def test_the_time_of_the_host_ends_before_the_gpu_does(monkeypatch):
    now = [0.0]

    def call():
        now[0] += 0.003

    def synchronize():
        now[0] += 0.05

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert clock.host_time(call) == pytest.approx(3.0)


def test_very_long_calls_are_made_four_times(gpu):
    gpu.once = 2000.0
    timing = measure(calls(2, gpu.log), torch.device("cuda"))
    assert timing.milliseconds == [2000.0] * 3 and len(gpu.log) == 4
    assert timing[1:3] == (1, "CUDA events")


def test_a_graph_that_cannot_be_captured_is_said_with_the_clock(gpu):
    gpu.refused = "it waits"
    timing = measure(calls(2, gpu.log), torch.device("cuda"))
    assert timing.clock == "CUDA events without a graph (it waits)" and timing.calls == 1


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_what_a_call_takes_at_once():
    def call():
        first = torch.ones(16 * MIB, device="cuda")  # 64 MiB
        second = first + 1
        del first
        return second * 2, second

    timing = measure([call, call], torch.device("cuda"))
    assert timing.peak == 2 * 64 * MIB
    assert timing.clock == "CUDA graph" and timing.calls > 1 and min(timing.milliseconds) > 0


def test_eager_time_is_by_the_wall_clock_and_waits_for_the_gpu(monkeypatch):
    now, log = [0.0], []

    def call():
        now[0] += 0.002
        log.append("call")

    def synchronize():
        now[0] += 0.01
        log.append("wait")

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert clock.eager_time(call, rounds=3, calls=5) == pytest.approx((5 * 2 + 10) / 5)
    assert log == 4 * ["wait", *5 * ["call"], "wait"]


@pytest.fixture
def events(monkeypatch):
    """A GPU whose clock, `now` in milliseconds, events read; the host never waits between them."""
    state = SimpleNamespace(now=0.0, bytes=1000, peak=0, log=[])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = state.now

        def elapsed_time(self, end):
            assert state.log[-1] == "wait"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: state.log.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state.bytes)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state.peak)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: setattr(state, "peak", state.bytes)
    )
    return state


def test_events_stand_around_each_run(events):
    lasting = iter((3.0, 5.0, 4.0))

    def run():
        events.now += next(lasting)

    assert clock.event_times(run, 3) == [3.0, 5.0, 4.0]


def test_the_peak_is_of_the_bytes_that_a_call_adds(events):
    events.peak = 9000  # of a call before

    def call():
        events.peak, events.now = events.bytes + 64, events.now + 2

    assert clock.peak_and_time(call) == (64, 2.0)


@pytest.mark.parametrize("first", [5000.0, 0.1])
def test_the_second_of_two_runs_says_how_many_fill_the_budget(monkeypatch, first):
    """The first may fill a cache."""
    times = {2: [first, 100.0], 10: [100.0] * 10}
    monkeypatch.setattr(clock, "event_times", lambda run, count: times[count])
    assert clock.repeated(lambda: None) == [100.0] * 10


def test_by_the_wall_clock_a_gpu_is_waited_for_in_each_run(events, monkeypatch):
    now, log = [0.0], []

    def wait():
        now[0] += 0.4
        events.log.append("wait")

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    timing = clock.by_wall_clock(lambda: log.append(0), torch.device("cuda"))
    assert timing.milliseconds == pytest.approx([400.0] * 3)
    assert len(log) == 2 + 3, "once to warm up, and once for the peak"
    assert timing[1:] == (1, "wall clock", 0, None, None)


@pytest.mark.gpu
def test_on_a_gpu_launches_are_counted():
    x = torch.randn(64, 64, device="cuda")
    timing = measure([lambda: x * 2 + 1], torch.device("cuda"))
    assert timing.launches == 2 and timing.eager > 0


@pytest.mark.gpu
def test_a_call_that_waits_for_the_gpu_is_not_captured_and_breaks_nothing():
    x = torch.ones(8, device="cuda")
    timing = measure([lambda: x.sum().item()], torch.device("cuda"))
    assert timing.clock.startswith("CUDA events without a graph (called a synchronizing")
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert measure([lambda: x + 1], torch.device("cuda")).clock == "CUDA graph"


@pytest.mark.gpu
def test_a_graph_of_forward_and_backward_is_captured():
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    timing = measure(
        [lambda: torch.autograd.grad((x @ x).softmax(-1).sum(), x)], torch.device("cuda")
    )
    assert timing.clock == "CUDA graph"
