"""FIRE in the fused kernels, alone and under DAPE, against its formula in float64."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from problems import Problem, RoundedScores, adapter_formula, differentiate, leaves, solve, visible
from torch.testing import assert_close

import dape
import textbook
from dape.attention import cuda, triton
from dape.attention.call import Call, checked
from dape.attention.fused import decode, geometry, operator, passes
from dape.attention.fused.mixers.features import FeaturesMixer
from dape.attention.fused.problem import Problem as FusedProblem
from dape.attention.fused.serves import obstacle
from dape.attention.fused.terms import Features, Mixed

# The interpreter's own warnings, of NumPy.
pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
DAPE = (5, 1, True, "concat")


@dataclass(frozen=True)
class FireProblem(Problem):
    """A problem whose bias is FIRE; L lies within the rows, and on none of them."""

    threshold: float = 9.3
    units: int = 6

    def modules(self):
        bias = dape.FIRE(self.heads, hidden=self.units)
        torch.nn.init.constant_(bias.log_threshold, torch.tensor(self.threshold).log())
        torch.nn.init.constant_(bias.log_c, -0.5)
        return bias, super().modules()[1]


PROBLEMS = {
    "rows before L and past it": FireProblem(rows=37, keys=37),
    "rows before L": FireProblem(rows=20, keys=20, threshold=50.5),
    "rows past L": FireProblem(rows=20, keys=20, threshold=0.5),
    "bidirectional": FireProblem(rows=19, keys=19, causal=False),
    "cross lengths": FireProblem(rows=5, keys=39, causal=False),
    "behind the keys": FireProblem(rows=5, keys=9, causal=False, query_offset=50),
    "before the keys": FireProblem(rows=9, keys=12, causal=False, query_offset=-7),
    "grouped heads": FireProblem(kv_heads=2, rows=18, keys=18),
    "heads no power of two": FireProblem(heads=5, kv_heads=1, rows=18, keys=18),
    "many units": FireProblem(rows=12, keys=12, units=33, threshold=4.5),
    "offset": FireProblem(rows=20, keys=33, query_offset=13),
    "more queries than keys": FireProblem(rows=21, keys=5),
    "rows without keys": FireProblem(query_offset=-3, threshold=1.5),
    "one query": FireProblem(batch=1, rows=1, keys=70, query_offset=69),
    "left padding": FireProblem(rows=18, keys=18, mask="left"),
    "right padding": FireProblem(rows=18, keys=18, mask="right", causal=False),
}


@pytest.fixture
def narrow_bands(monkeypatch):
    """Let the scratch hold few scores, so that small problems take several bands."""
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 4 * 40 * 32)


def drawn(problem, dtype=torch.float32):
    """Tensors and modules in float64 with values that `dtype` has, and a mask."""
    tensors = [x.to(dtype).double() for x in problem.tensors()]
    modules = [copy.deepcopy(m) and m.to(dtype).double() for m in problem.modules()]
    return tensors, modules, problem.draw_mask()


def fire(bias, i, j):
    """V relu(v x + c) + b of every head, x = psi(|i - j|) / psi(max(i, j, L)); [H, keys]."""

    def psi(x):
        return torch.log(1 + bias.log_c.exp() * x)

    later = j.clamp(min=i).double()
    x = psi((i - j).abs()) / psi(
        torch.where(later > bias.log_threshold.exp(), later, bias.log_threshold.exp())
    )
    hidden = bias.weight_in * x + bias.bias_in[:, None]
    return bias.weight_out @ torch.where(hidden > 0, hidden, 0) + bias.bias_out[:, None]


def solve_by_formula(problem, tensors, modules, mask):
    """Output and gradients in float64: the textbook's attention, a query at a time."""
    (query, key, value), (bias, adapter), parameters = leaves(tensors, modules)
    seen, keys, rows = visible(problem, mask), torch.arange(problem.keys), []
    for row in range(problem.rows):
        position = row + problem.query_offset
        values = fire(bias, position, keys)
        out, _ = textbook.attention(
            query[:, :, [row]],
            key,
            value,
            seen[:, [row]],
            torch.full((problem.batch, 1), position),
            keys.expand(problem.batch, -1),
            lambda distance, values=values: values,
            adapter_formula(adapter),
            problem.scale,
        )
        rows.append(out)
    out = torch.cat(rows, dim=2)
    return out, differentiate(out, [query, key, value, *parameters])


def close(problem, dtype=torch.float32, tolerance=1e-4, least=0.1):
    """Compare the output and all gradients with the formula's, by the size of the largest.

    `least` is a size that counts: the gradient of a constant of every key is zero but for rounding.
    """
    given = drawn(problem, dtype)
    out, gradients = solve(problem, *given, (None, None), "triton", dtype)
    true_out, true_gradients = solve_by_formula(problem, *given)
    for found, true in zip([out, *gradients], [true_out, *true_gradients], strict=True):
        scale = max(least, true.abs().max().item())
        assert_close(found.double(), true, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("adapter", [None, DAPE], ids=["fire", "dape-fire"])
def test_every_kind_of_call_equals_the_formula(name, adapter):
    close(replace(PROBLEMS[name], adapter=adapter))


@pytest.mark.parametrize("inputs", ["concat", "sum", "bias", "scores"])
@pytest.mark.parametrize("residual", [True, False])
def test_every_form_of_dape_equals_the_formula(inputs, residual):
    close(FireProblem(rows=18, keys=18, adapter=(4, 1, residual, inputs)))


def test_talking_heads_equal_the_formula():
    close(FireProblem(rows=18, keys=18, adapter="talking-heads"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offset", [0, 21, -20])
def test_bands_change_nothing(narrow_bands, causal, offset, monkeypatch):
    # The least at which blocks of one of several bands begin behind the first key.
    batch, rows = (1, 130) if causal and offset <= 0 else (2, 70)
    problem = FireProblem(
        batch=batch, rows=rows, keys=rows + 6, causal=causal, query_offset=offset, mask="left",
        adapter=DAPE, threshold=30.5,
    )  # fmt: skip
    tensors, mixing = problem.tensors(torch.float16), Mixed(*[torch.zeros(4, 4)] * 4)
    whole = FusedProblem(*tensors, mixing, None, 1.0, causal, offset)
    assert len(geometry.bands(whole)) > 2
    assert any(band.keys.start > 0 for band in geometry.blocks(whole))
    close(replace(problem, batch=1))
    call = (*drawn(problem, torch.float16), (None, None), "triton", torch.float16)
    out, gradients = solve(problem, *call)
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 2**28)
    in_one, gradients_in_one = solve(problem, *call)
    for found, expected in zip([out, *gradients], [in_one, *gradients_in_one], strict=True):
        scale = expected.abs().max().item()
        assert_close(found, expected, rtol=0, atol=1e-3 * max(0.1, scale))


def test_the_small_gradients_of_c_and_the_threshold_are_theirs():
    problem = FireProblem(rows=37, keys=37, adapter=DAPE)
    given = drawn(problem)
    _, gradients = solve(problem, *given, (None, None), "triton", torch.float32)
    _, true_gradients = solve_by_formula(problem, *given)
    for found, true in zip(gradients[3:5], true_gradients[3:5], strict=True):
        assert_close(found.double(), true, rtol=1e-4, atol=0)


@pytest.mark.parametrize("adapter", [None, DAPE], ids=["fire", "dape-fire"])
@pytest.mark.parametrize("rows", [20, 1])
def test_half_precision_is_as_exact_as_its_digits(adapter, rows):
    problem = FireProblem(rows=rows, keys=20, query_offset=20 - rows, adapter=adapter)
    close(problem, torch.float16, tolerance=5e-3, least=1.0)


FEW = {
    "one query": FireProblem(rows=1, keys=150, query_offset=149),
    "several queries": FireProblem(batch=1, rows=3, keys=150, query_offset=147, mask="left"),
    "bidirectional": FireProblem(rows=2, keys=70, causal=False, query_offset=30, mask="right"),
    "behind the keys": FireProblem(rows=1, keys=40, causal=False, query_offset=90),
    "rows without keys": FireProblem(rows=4, keys=70, query_offset=-2, threshold=1.5),
    "grouped heads, many units": FireProblem(
        batch=1, heads=5, kv_heads=1, rows=2, keys=40, units=33, query_offset=38
    ),
}


@pytest.mark.parametrize("adapter", [None, DAPE], ids=["fire", "dape-fire"])
@pytest.mark.parametrize("name", FEW)
def test_few_queries_are_decoded(name, adapter, monkeypatch):
    served, forward = [], decode.forward

    def spied(problem, terms, found):
        served.append(type(terms))
        return forward(problem, terms, found)

    monkeypatch.setattr(decode, "forward", spied)
    close(replace(FEW[name], adapter=adapter))
    assert served == [Features]


def test_two_backward_passes_agree_bit_for_bit(narrow_bands):
    problem = FireProblem(rows=40, keys=40, adapter=DAPE, causal=False)
    given = drawn(problem)
    runs = [solve(problem, *given, (None, None), "triton", torch.float32)[1] for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_cuda_backend_serves_what_triton_does(dtype):
    query = torch.zeros(1, 24, 3, 8, dtype=dtype)
    for adapter in (None, dape.DAPE(24, 64)):
        call = Call(query, query, query, dape.FIRE(24), adapter)
        assert cuda.obstacle(call) is None and triton.obstacle(call) is None
    problem = drawn_problem(dtype)
    kinds = {type(passes.mixer_of(problem, backend)) for backend in ("cuda", "triton")}
    assert kinds == {FeaturesMixer}


def drawn_problem(dtype):
    query = torch.zeros(1, 4, 3, 8, dtype=dtype)
    tables = operator.tables(dape.FIRE(4), None, 4, 3, query.device)
    return operator.problem_of(query, query, query, tables, None, 1.0, True, 0)


def test_more_units_than_the_kernels_hold_are_refused():
    query = torch.zeros(1, 4, 3, 8)
    found = obstacle(Call(query, query, query, dape.FIRE(4, hidden=65)))
    assert found == "hidden=65 is more than 64"


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [None, (32, 1, True, "concat")], ids=["fire", "dape-fire"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [129, 512])
def test_on_a_gpu_no_further_from_float64_than_the_textbook_in_its_dtype(
    backend, dtype, rows, adapter, benchmarks
):
    """The textbook rounds what kernels round: weights, outputs, scores in the scratch."""
    tensors = [torch.randn(2, 12, rows, 64, device="cuda", dtype=dtype) for _ in range(3)]
    modules = FireProblem(heads=12, threshold=100.5, units=32, adapter=adapter).modules()
    results = []
    for name, wide, widest in (
        (backend, dtype, torch.float32),
        ("textbook", dtype, torch.float32),
        ("chunked", torch.float64, torch.float64),
    ):
        inputs = [x.detach().to(wide, copy=True).requires_grad_() for x in tensors]
        found = [m and copy.deepcopy(m).to("cuda", widest) for m in modules]
        parameters = [p for m in found if m for p in m.parameters()]
        if name == "textbook":
            if found[1] is not None and dtype is not torch.float32:
                found[1] = RoundedScores(found[1])
            out, _ = benchmarks("judged_calls").textbook(checked(*inputs, *found))
        else:
            out = dape.attention(*inputs, *found, backend=name)
        torch.manual_seed(1)
        weight = torch.randn(out.shape, device="cuda").to(dtype).to(wide)
        results.append([out, *torch.autograd.grad(out, [*inputs, *parameters], weight)])
    digits = 1e-4 if dtype is torch.float32 else 1e-2
    for found, plain, true in zip(*results, strict=True):
        if true.norm() < 1e-9:
            continue  # a constant of every key
        error, theirs = ((x.double() - true).norm() for x in (found, plain))
        assert error < max(2 * theirs, digits * true.norm().clamp(min=1.0))
