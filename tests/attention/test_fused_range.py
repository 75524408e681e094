"""What 16 bits do not hold: large scores, large biases, large weights, in the fused kernels."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import Problem, close, drawn, fused, leaves
from test_large_scores import beside_sdpa, silent

import dape
from dape.attention.fused import geometry, operator, overflow, passes, problem, table_operators
from dape.attention.fused.problem import Gate
from dape.positions.bias import Bias
from dape.positions.scheme import BASES

pytestmark = [
    pytest.mark.unhooked,
    # The interpreter's own warnings, of NumPy.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
DAPE, DAPE3 = (5, 1, True, "concat"), (5, 3, True, "concat")
PROBLEMS = {
    "dape": Problem(rows=20, keys=20, adapter=DAPE),
    "bidirectional": Problem(rows=20, keys=20, causal=False, adapter=DAPE),
    "padding, grouped heads, offset": Problem(
        rows=20, keys=40, query_offset=20, kv_heads=2, mask="left", adapter=DAPE
    ),
    "few queries": Problem(rows=2, keys=50, query_offset=48, adapter=DAPE),
    "talking heads": Problem(rows=20, keys=20, adapter="talking-heads"),
    "dape3": Problem(rows=18, keys=18, adapter=DAPE3),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_wide_range_equals_the_textbook(name, monkeypatch):
    monkeypatch.setattr(overflow, "LARGEST_SCORE", -1.0)
    close(PROBLEMS[name], dtype=torch.float16, tolerance=5e-3, least=1.0)


@pytest.mark.parametrize(
    ("bias", "kernel_size"), [(dape.Kerple, 1), (dape.Kerple, 3), (dape.FIRE, 1)]
)
def test_a_mixer_that_is_not_wanted_leaves_the_scratch_alone(bias, kernel_size):
    query, key, value = Problem(rows=20, keys=20).tensors(torch.float16)
    given = operator.tables(bias(4), dape.DAPE(4, 5, kernel_size=kernel_size), 4, 20, query.device)
    problem = operator.problem_of(query, key, value, given, None, 1.0, True, 0)
    problem = problem._replace(gate=Gate(torch.zeros(1, dtype=torch.int32), True))
    (band,) = geometry.bands(problem)
    x = geometry.Scratch.of(problem, (band,)).view(band).normal_()
    before = x.clone()
    passes.mixer_of(problem, "triton").mix(x, band)
    assert torch.equal(x, before)


def flag_of(tensors, bias, adapter, learns=False):
    heads, length = tensors[0].shape[1:3]
    found = operator.tables(bias, adapter, heads, length, tensors[0].device)
    with torch.no_grad():
        return fused(*tensors, found, None, 1.0, True, 0, "triton", learns)[3].item()


@pytest.mark.parametrize("size", [1, 40])
@pytest.mark.parametrize("adapter", [DAPE, DAPE3])
def test_scores_ask_for_the_wide_range_by_their_size(adapter, size):
    problem = Problem(rows=20, keys=20, adapter=adapter)
    query, key, value = problem.tensors(torch.float16)
    assert flag_of((query * size, key, value), *problem.modules()) == (size == 40)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("name", ["weight_in", "weight_out"])
def test_so_do_weights(name, kernel_size):
    problem = Problem(rows=20, keys=20, adapter=(5, kernel_size, True, "concat"))
    bias, adapter = problem.modules()
    with torch.no_grad():
        getattr(adapter, name).mul_(1e4)
    assert flag_of(problem.tensors(torch.float16), bias, adapter) == 1


@pytest.mark.parametrize("adapter", [DAPE, "talking-heads"], ids=str)
def test_large_sums_ask_for_it_where_weights_learn_alone(adapter):
    """Logits near 2,000 are in float32, and weights without gradients sum no tables."""
    problem = Problem(rows=24, keys=24, head_dim=8, value_dim=8, adapter=adapter)
    query, key, value = problem.tensors(torch.float16)
    bias, adapter = Far(4, 2e3, 1.0), problem.modules()[1]
    assert flag_of((query, key, value), bias, adapter, learns=True) == 1
    assert flag_of((query, key, value), bias, adapter, learns=False) == 0
    with torch.no_grad():
        out = dape.attention(query, key, value, bias, adapter, backend="triton")
        exact = dape.attention(
            *(x.double() for x in (query, key, value)),
            *(copy.deepcopy(x).double() for x in (bias, adapter)),
            backend="reference",
        )
    textbook = dape.attention(
        *(x.float() for x in (query, key, value)), bias, adapter, backend="reference"
    )
    error, yardstick = ((x.double() - exact).norm() / exact.norm() for x in (out, textbook))
    assert error <= 1e-3 + 4 * yardstick


def test_in_the_wide_range_two_backward_passes_agree_bit_for_bit(monkeypatch):
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 4 * 64 * 64)
    problem = Problem(batch=1, rows=134, keys=150, adapter=DAPE)
    (query, key, value), modules, _, _ = drawn(problem)
    tensors, modules, parameters = leaves([query * 40, key, value], modules, torch.float16)
    modules = [m.float() for m in modules]
    out = dape.attention(*tensors, *modules, backend="triton")
    first, second = (
        torch.autograd.grad(out.sum(), [*tensors, *parameters], retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert any(x.any() for x in first)


@pytest.mark.parametrize("adapter", [DAPE, DAPE3])
def test_programs_that_walk_over_tiles_change_nothing(adapter, monkeypatch):
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 8 * 64 * 128)
    given = Problem(batch=2, rows=75, keys=90, query_offset=15, kv_heads=2, adapter=adapter)
    (query, key, value), modules, _, _ = drawn(given)
    tensors, modules, parameters = leaves([query * 40, key, value], modules, torch.float16)
    modules = [m.float() for m in modules]
    found = []
    for programs in (1, 512):
        monkeypatch.setattr(problem, "WIDE_PROGRAMS", programs)
        out = dape.attention(*tensors, *modules, query_offset=15, backend="triton")
        found.append([out, *torch.autograd.grad(out.sum(), [*tensors, *parameters])])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert all(x.any() for x in found[0][:4])


@pytest.mark.parametrize("size", [30.0, 100.0])
def test_large_scores_are_as_exact_as_in_pytorch(size):
    query, key, value = torch.randn(3, 1, 4, 70, 64)
    tensors = [x.half() for x in (query + size, key + size / 4, value)]
    ours, theirs = beside_sdpa(tensors, "triton", (None, silent(4)))
    assert all(x <= 4 * y for x, y in zip(ours, theirs, strict=True))


class Far(Bias):
    """A bias that is large everywhere: near `level`, with a slope and a bend of each head."""

    relative = True

    def __init__(self, heads, level, slope):
        super().__init__(heads)
        self.level, self.slope = level, slope
        self.bend = torch.nn.Parameter(torch.randn(heads))

    def forward(self, query_positions, key_positions):
        delta = (query_positions[:, None] - key_positions).abs().to(self.bend.dtype)
        bend = self.bend[:, None, None]
        return self.level - self.slope * delta + bend * torch.log1p(delta)


def solved(tensors, bias, adapter, backend, dtype, learns=True):
    tensors, (bias, adapter), _ = leaves(tensors, (bias, adapter))
    tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
    if dtype == torch.float64:
        bias, adapter = bias.double(), adapter.double()
    parameters = [*bias.parameters(), *(p for p in adapter.parameters() if p.shape != (4,))]
    for parameter in (*bias.parameters(), *adapter.parameters()):
        parameter.requires_grad_(learns)
    out = dape.attention(*tensors, bias, adapter, backend=backend)
    given = [*tensors, *parameters] if learns else tensors
    return [out, *torch.autograd.grad(out.square().sum(), given)]


def no_worse_than_in_float32(level, slope, adapter, learns):
    problem = Problem(rows=24, keys=24, head_dim=8, value_dim=8, adapter=adapter)
    tensors = problem.tensors(torch.float16)
    bias, adapter = Far(4, level, slope), problem.modules()[1]
    halves = [x.float() for x in tensors]
    exact = solved(tensors, bias, adapter, "reference", torch.float64, learns)
    found = solved(tensors, bias, adapter, "triton", torch.float16, learns)
    floats = solved(halves, bias, adapter, "reference", torch.float32, learns)
    for ours, theirs, true in zip(found, floats, exact, strict=True):
        assert ours.isfinite().all()
        size = true.norm() + 1e-2
        error, yardstick = ((x.double() - true).norm() / size for x in (ours, theirs))
        assert error <= 5e-3 + 4 * yardstick


@pytest.mark.parametrize("adapter", [DAPE, DAPE3, "talking-heads"], ids=str)
@pytest.mark.parametrize(
    ("level", "slope"), [(-1e5, 0.0), (1e5, 0.0), (1e5, 3.0), (-3e5, 1e4), (3e5, -1e4), (2e3, 1.0)]
)
def test_large_biases_are_no_worse_than_in_float32(level, slope, adapter):
    """float32 itself holds 1e5 to 0.008: what the textbook in float32 loses is the yardstick."""
    no_worse_than_in_float32(level, slope, adapter, learns=True)


@pytest.mark.parametrize("adapter", [DAPE, "talking-heads"], ids=str)
@pytest.mark.parametrize(("level", "slope"), [(-1e5, 0.0), (1e5, 3.0), (2e3, 1.0)])
def test_nor_are_they_where_bias_and_adapter_do_not_learn(level, slope, adapter):
    """Without sums of tables the kernels stay in 16 bits."""
    no_worse_than_in_float32(level, slope, adapter, learns=False)


BIASES = {name: scheme.bias.module for name, scheme in BASES.items() if scheme.bias is not None}
BIASES["sandwich"] = partial(dape.Sandwich, d_bar=16)  # a million rows of sines take their time


def far(name, adapter, offset):
    problem = Problem(batch=1, rows=20, keys=70, query_offset=offset, adapter=adapter)
    return problem.tensors(torch.float16), (BIASES[name](4), problem.modules()[1])


def close_to_float64(out, tensors, modules, name, offset):
    doubles = [m and copy.deepcopy(m).double() for m in modules]
    exact = dape.attention(
        *(x.double() for x in tensors), *doubles, query_offset=offset, backend="reference"
    )
    assert exact.isfinite().all() and out.isfinite().all()
    if name not in ("alibi", "kerple-power"):  # whose neighbours float32 cannot tell apart there
        assert (out.double() - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("offset", [524_288, 1_048_576 - 20])
@pytest.mark.parametrize("adapter", [None, DAPE, "talking-heads"], ids=str)
@pytest.mark.parametrize("name", BIASES)
@torch.no_grad()
def test_every_bias_is_finite_at_every_distance(name, adapter, offset, monkeypatch):
    monkeypatch.setattr(table_operators, "ENTRIES", 2**15)  # few programs for the interpreter
    tensors, modules = far(name, adapter, offset)
    out = dape.attention(*tensors, *modules, query_offset=offset, backend="triton")
    close_to_float64(out, tensors, modules, name, offset)


@pytest.mark.parametrize("adapter", [None, DAPE], ids=str)
@pytest.mark.parametrize("name", ["alibi", "kerple-power", "kerple", "fire"])
def test_so_are_its_gradients(name, adapter):
    tensors, modules, parameters = leaves(*far(name, adapter, 2048))
    if name == "kerple-power":
        torch.nn.init.constant_(modules[0].raw_p, 3.0)  # a power of 1.9
    out = dape.attention(*tensors, *modules, query_offset=2048, backend="triton")
    close_to_float64(out, tensors, modules, name, 2048)
    found = torch.autograd.grad(out.sum(), [*tensors, *parameters], allow_unused=True)
    assert all(x.isfinite().all() for x in found if x is not None)


def test_neither_are_masked_keys_a_reason():
    """A padded key may hold anything finite."""
    problem = replace(PROBLEMS["dape"], batch=1)
    (query, key, value), modules, _, _ = drawn(problem, torch.float16)
    mask = torch.arange(20)[None] >= 6
    call = {"backend": "triton", "mask": mask}
    tensors = [x.half() for x in (query, key, value)]
    expected = dape.attention(*tensors, *modules, **call)
    tensors[1][:, :, :6] = 6e4
    found = dape.attention(*tensors, *modules, **call)
    assert torch.allclose(found[:, :, 6:], expected[:, :, 6:], atol=2e-3)
