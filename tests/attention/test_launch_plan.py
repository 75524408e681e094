"""Plans of fused calls: what they start gives the numbers of the launchers, bit for bit."""

import ctypes
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import dape
from dape.attention.fused import geometry, plan, replay

# The interpreter's own warnings, of NumPy.
pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
PARTS = {
    "nothing": (None, None),
    "kerple": (dape.Kerple, None),
    "t5": (dape.T5, None),
    "dape-kerple": (dape.Kerple, dape.DAPE),
    "fire": (dape.FIRE, None),
    "dape-fire": (dape.FIRE, dape.DAPE),
    "dape3-kerple": (dape.Kerple, partial(dape.DAPE, hidden=5, kernel_size=3)),
}


def at(address, dtype):
    """Return a tensor of the number at an address."""
    if not address:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


class Driver:
    """Graphs of the driver: what a capture records, a graph starts."""

    def __init__(self):
        self.recording, self.graphs, self.launched, self.destroyed = None, {}, [], []

    def cuStreamBeginCapture_v2(self, stream, mode):
        assert self.recording is None and (stream.value, mode) == (8, 2)
        self.recording = []
        return 0

    def cuStreamEndCapture(self, stream, graph):
        graph._obj.value = len(self.graphs) + 1
        self.graphs[graph._obj.value], self.recording = self.recording, None
        return 0

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):
        executable._obj.value = 1000 + graph.value
        self.graphs[executable._obj.value] = self.graphs[graph.value]
        return 0

    def cuGraphDestroy(self, graph):
        return 0

    def cuGraphExecDestroy(self, executable):
        self.destroyed.append(executable.value)
        return 0

    def cuGraphLaunch(self, executable, stream):
        assert stream.value == 7 and executable.value not in self.destroyed
        self.launched.append(executable.value)
        for kernel in self.graphs[executable.value]:
            kernel()
        return 0


@pytest.fixture
def driver(monkeypatch):
    """Return the driver behind the graphs of plans, of which there are none yet."""
    driver = Driver()
    monkeypatch.setattr(replay, "driver", lambda: driver)
    monkeypatch.setattr(replay, "aside", lambda device: 8)
    monkeypatch.setattr(replay, "current_stream", lambda device: 7)
    monkeypatch.setattr(replay, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(plan, "GRAPHS", replay.Graphs())
    return driver


@pytest.fixture
def started(monkeypatch, driver):
    """Let plans be made and run by the interpreter; return the number of kernels of each plan."""
    found = []

    def prepared(kernel, grid, arguments, options):
        dtypes = {n: x.dtype for n, x in enumerate(arguments) if isinstance(x, plan.Pointer)}

        def run(stream, *given):
            assert stream == (7 if driver.recording is None else 8)
            given = [at(x, dtypes[n]) if n in dtypes else x for n, x in enumerate(given)]
            begin = partial(kernel[grid], *given, **options)
            begin() if driver.recording is None else driver.recording.append(begin)

        return run, [None]

    def run(self, *given):
        found.append(len(self.starts))
        return whole(self, *given)

    whole = plan.Plan.run
    monkeypatch.setattr(plan.Plan, "run", run)
    monkeypatch.setattr(plan, "prepared", prepared)
    monkeypatch.setattr(plan, "current_stream", lambda device: 7)
    monkeypatch.setattr(plan, "DEVICES", ("cpu",))
    plan.calls_of.cache_clear()
    yield found
    plan.calls_of.cache_clear()


def solve(qkv, bias, adapter, **options):
    """Return output, log-sum-exp and gradients, for heads that lie in one tensor."""
    qkv = qkv.clone().requires_grad_()
    parameters = [p for m in (bias, adapter) if m for p in m.parameters()]
    found = dape.attention(
        *qkv.unbind(2), bias, adapter, backend="triton", return_lse=True, **options
    )
    weights = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x) for x in found]
    return *found, *torch.autograd.grad(found, [qkv, *parameters], weights)


def drawn(dtype, rows=21):
    """Return Q, K and V of two elements and four heads of sixteen, side by side."""
    return torch.randn(2, 4, 3, rows, 16).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_a_plan_gives_the_numbers_of_the_launchers(name, dtype, started, monkeypatch):
    modules = [make and make(4) for make in PARTS[name]]
    inputs = [drawn(dtype) for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(plan, "DEVICES", ())
        expected = [solve(qkv, *modules) for qkv in inputs]
    for number, (qkv, theirs) in enumerate(zip(inputs, expected, strict=True)):
        for mine, other in zip(solve(qkv, *modules), theirs, strict=True):
            assert torch.equal(mine, other)
        assert bool(started) == (number > 0)  # the first call is computed without
    half = len(started) // 2
    assert started[:half] == started[half:] and min(started) > 0


@pytest.mark.parametrize("name", ["dape-kerple", "dape-fire", "dape3-kerple"])
def test_bands_have_a_plan_too(name, started, monkeypatch):
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 4 * 64 * 64)
    modules, qkv = [make(4) for make in PARTS[name]], drawn(torch.float16, rows=100)[:1]
    first, _, third = (solve(qkv, *modules) for _ in range(3))
    assert max(started) > 20
    for mine, other in zip(third, first, strict=True):
        assert torch.equal(mine, other)


class Memory:
    """Results of plans at the addresses of the step before, as PyTorch's allocator gives them."""

    def __init__(self):
        self.kept, self.used, self.empty = {}, Counter(), plan.empty

    def __call__(self, layout, device):
        if device == "meta":
            return self.empty(layout, device)
        self.used[layout] += 1
        key = layout, self.used[layout]
        if key not in self.kept:
            self.kept[key] = self.empty(layout, device)
        self.kept[key].view(torch.uint8).fill_(255)
        return self.kept[key]


@pytest.mark.parametrize("name", ["dape-kerple", "dape-fire", "dape3-kerple"])
def test_tensors_at_the_same_addresses_become_a_graph(name, started, driver, monkeypatch):
    """Numbers are as without graphs, and as the numbers at these addresses now are."""
    modules = [make and make(4) for make in PARTS[name]]
    parameters = [p for m in modules if m for p in m.parameters()]
    inputs = [drawn(torch.float16) for _ in range(7)]
    leaf = drawn(torch.float16).requires_grad_()
    weight = torch.randn(2, 4, 21, 16).half()
    memory = Memory()

    def learn(values):
        memory.used.clear()
        with torch.no_grad():
            leaf.copy_(values)
        out = dape.attention(*leaf.unbind(2), *modules, backend="triton")
        found = [out, *torch.autograd.grad(out, [leaf, *parameters], weight)]
        return [x.clone() for x in found]

    expected = [learn(each) for each in inputs]
    assert not driver.graphs
    monkeypatch.setattr(plan, "empty", memory)
    for step, (each, theirs) in enumerate(zip(inputs, expected, strict=True)):
        for mine, other in zip(learn(each), theirs, strict=True):
            assert torch.equal(mine, other)
        assert bool(driver.launched) == (step >= replay.OFTEN - 1)
    first = driver.launched.index(driver.launched[-1])
    assert len(set(driver.launched[: first + 1])) >= 2  # forward and backward


def addressed(graphs, *addresses, plan=0, begin=lambda stream: None):
    return graphs.run(plan, addresses, torch.device("cpu"), begin)


def test_a_graph_is_of_one_plan_and_of_its_addresses(driver):
    graphs, streams = replay.Graphs(), []
    found = [addressed(graphs, 16, 32, begin=streams.append) for _ in range(5)]
    assert found == [False, False, True, True, True] and streams == [8]
    assert not addressed(graphs, 16, 48)
    assert not addressed(graphs, 16, 32, plan=1)
    assert not addressed(graphs, 16)


def test_the_latest_graphs_are_kept(driver, monkeypatch):
    monkeypatch.setattr(replay, "MOST_GRAPHS", 3)
    graphs = replay.Graphs()
    for address in (1, 2, 3):
        for _ in range(3):
            addressed(graphs, address)
    addressed(graphs, 1)
    addressed(graphs, 4)
    assert driver.destroyed == [driver.launched[1]] and len(graphs.known) == 3
    assert addressed(graphs, 1) and addressed(graphs, 3) and not addressed(graphs, 2)


def test_threads_share_graphs(driver, monkeypatch):
    """No thread starts a graph that another thread has destroyed."""
    monkeypatch.setattr(replay, "MOST_GRAPHS", 2)
    graphs, slow = replay.Graphs(), driver.cuGraphLaunch

    def launch(executable, stream):
        time.sleep(0)  # another thread may go on
        return slow(executable, stream)

    def work(first):
        return sum(addressed(graphs, first + n // 4 % 2) for n in range(200))

    monkeypatch.setattr(driver, "cuGraphLaunch", launch)
    with ThreadPoolExecutor(8) as pool:
        launched = sum(pool.map(work, range(8)))
    assert launched == len(driver.launched) > 0 and driver.destroyed


def test_nothing_is_captured_within_a_capture(driver, monkeypatch):
    graphs = replay.Graphs()
    monkeypatch.setattr(replay, "is_current_stream_capturing", lambda: True)
    assert not any(addressed(graphs, 1) for _ in range(5)) and not driver.graphs


def test_without_memory_for_a_graph_the_kernels_start_one_by_one(driver, monkeypatch):
    graphs, streams = replay.Graphs(), []
    with monkeypatch.context() as patch:
        patch.setattr(driver, "cuGraphInstantiateWithFlags", lambda *given: 2)
        assert not any(addressed(graphs, 1, begin=streams.append) for _ in range(5))
    assert streams == [8], "a plan that found no memory asks no more"
    for _ in range(3):
        addressed(graphs, 2)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "cuGraphLaunch", lambda *given: 2)
        assert not addressed(graphs, 2)
    assert addressed(graphs, 2)


def test_a_failed_start_ends_the_capture(driver):
    graphs = replay.Graphs()

    def begin(stream):
        raise RuntimeError("no kernel")

    for _ in range(2):
        assert not addressed(graphs, 1)
    with pytest.raises(RuntimeError, match="no kernel"):
        addressed(graphs, 1, begin=begin)
    assert driver.recording is None
    assert addressed(graphs, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["kerple", "dape-kerple", "dape-fire", "dape3-kerple"])
def test_on_a_gpu_graphs_of_plans_give_the_numbers_of_kernels(name, monkeypatch):
    modules = [make and make(4).cuda() for make in PARTS[name]]
    parameters = [p for m in modules if m for p in m.parameters()]
    inputs = [torch.randn(2, 200, 3, 4, 64, device="cuda").bfloat16() for _ in range(8)]
    leaf, weight = torch.zeros_like(inputs[0], requires_grad=True), inputs[0][:, :, 0]

    def learn(values):
        with torch.no_grad():
            leaf.copy_(values)
        qkv = [x.transpose(1, 2) for x in leaf.unbind(2)]
        out = dape.attention(*qkv, *modules, backend="cuda").transpose(1, 2)
        return [
            x.double().sum().item()
            for x in (out, *torch.autograd.grad(out, [leaf, *parameters], weight))
        ]

    graphs = replay.Graphs()
    monkeypatch.setattr(plan, "GRAPHS", graphs)
    with monkeypatch.context() as patch:
        patch.setattr(replay, "OFTEN", 10**9)
        expected = [learn(values) for values in inputs]
    graphs.known.clear()
    assert [learn(values) for values in inputs] == expected
    repeated = {key[0] for key, graph in graphs.known.items() if not isinstance(graph, int)}
    assert repeated and repeated == {key[0] for key in graphs.known}
    with torch.cuda.stream(torch.cuda.Stream()):
        assert [learn(values) for values in inputs] == expected
