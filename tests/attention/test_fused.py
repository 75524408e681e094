"""The fused kernels against the float64 textbook: on a CPU by Triton's interpreter."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.utils.prune
from problems import Problem, close, drawn, fused, leaves, solve
from torch.testing import assert_close

import dape
from dape.attention.fused import geometry, operator, passes
from dape.attention.fused.mixers import mixer
from dape.attention.fused.problem import Problem as FusedProblem
from dape.attention.fused.terms import Mixed
from dape.attention.select import BACKENDS
from dape.bench import parity
from dape.bench.case import DTYPES, TRAINING, Case, build, draw
from dape.errors import UserError
from dape.positions.bias import Bias

# The interpreter's own warnings, of NumPy.
pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
DAPE = (5, 1, True, "concat")
PROBLEMS = {
    "causal": Problem(rows=37, keys=37),
    "bidirectional": Problem(rows=19, keys=19, causal=False),
    "grouped heads": Problem(kv_heads=2, rows=9, keys=9),
    "one key head": Problem(heads=5, kv_heads=1),
    "offset": Problem(rows=20, keys=33, query_offset=13),
    "more keys than queries see": Problem(rows=4, keys=40, query_offset=2),
    "more queries than keys": Problem(rows=21, keys=5),
    "rows without keys": Problem(query_offset=-3),
    "cross lengths": Problem(rows=5, keys=39, causal=False),
    "behind the keys": Problem(rows=5, keys=9, causal=False, query_offset=50),
    "before the keys": Problem(rows=9, keys=12, causal=False, query_offset=-7),
    "one query": Problem(batch=1, rows=1, keys=300, query_offset=299),
    "few rows and many keys": Problem(
        batch=1, heads=2, kv_heads=2, rows=20, keys=600, query_offset=570
    ),
    "left padding": Problem(rows=18, keys=18, mask="left"),
    "right padding": Problem(mask="right", causal=False),
    "mask of one row": Problem(mask="keys"),
    "scale": Problem(scale=0.3),
    "wider values": Problem(value_dim=6),
}


@pytest.fixture
def narrow_bands(monkeypatch):
    """Let the scratch hold few scores, and programs few rows: several bands, and segments."""
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 2 * 4 * 40 * 32)
    monkeypatch.setattr(mixer, "ROWS", 16)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("adapter", [None, DAPE], ids=["static", "dape"])
def test_every_kind_of_call_equals_the_textbook(name, adapter):
    close(replace(PROBLEMS[name], adapter=adapter))


@pytest.mark.parametrize("inputs", ["concat", "sum", "bias", "scores"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", ["alibi", None])
def test_every_form_of_dape_equals_the_textbook(inputs, residual, bias):
    close(Problem(adapter=(4, 1, residual, inputs), bias=bias))


@pytest.mark.parametrize("name", ["causal", "bidirectional", "left padding", "grouped heads"])
@pytest.mark.parametrize("bias", ["kerple", None])
def test_talking_heads_equal_the_textbook(name, bias):
    close(replace(PROBLEMS[name], adapter="talking-heads", bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_past_the_last_row_a_bias_above_zero_leaves_no_trace(dtype):
    """Sandwich begins at 8 H: what is no row must not make infinite weights of it."""
    given, bias = torch.randn(3, 1, 12, 33, 8).to(dtype), dape.Sandwich(12)
    weight = torch.randn(1, 12, 33, 8)

    def gradients(tensors, backend):
        tensors = [x.requires_grad_() for x in tensors.unbind()]
        out = dape.attention(*tensors, bias, backend=backend)
        return torch.autograd.grad(out, tensors, weight.to(out))

    exact = gradients(given.double(), "reference")
    for found, true in zip(gradients(given, "triton"), exact, strict=True):
        assert (found.double() - true).norm() <= 5e-3 * true.norm()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offset", [0, 21])
def test_bands_change_nothing(narrow_bands, causal, offset, monkeypatch):
    # The least at which blocks of a band begin behind the first key.
    rows, keys = (130, 130) if causal and not offset else (70, 86)
    problem = Problem(
        batch=2, rows=rows, keys=keys, causal=causal, query_offset=offset, adapter=DAPE, mask="left"
    )
    halves = problem.tensors(torch.float16)
    whole = FusedProblem(*halves, mixing(), None, 1.0, causal, offset)
    assert len(geometry.bands(whole)) > 3
    assert any(band.keys.start > 0 for band in geometry.blocks(whole))
    assert passes.mixer_of(whole, "triton").segments(1, 10, 32) == 2
    close(replace(problem, batch=1))
    given = drawn(problem, torch.float16)
    out, gradients = solve(problem, *given, "triton", torch.float16)
    monkeypatch.setattr(geometry, "SCORES_PER_BAND", 2**28)
    in_one, gradients_in_one = solve(problem, *given, "triton", torch.float16)
    for found, expected in zip([out, *gradients], [in_one, *gradients_in_one], strict=True):
        scale = expected.abs().max().item()
        assert_close(found, expected, rtol=0, atol=1e-3 * max(0.1, scale))


def mixing():
    return Mixed(torch.zeros(4, 91), torch.zeros(91, 5), torch.zeros(5, 4), torch.zeros(4, 5))


def test_many_heads_and_hidden_units():
    close(Problem(batch=1, heads=25, kv_heads=5, rows=5, keys=5, adapter=(20, 1, True, "concat")))


def test_half_precision_is_as_exact_as_its_digits():
    close(Problem(rows=20, keys=20, adapter=DAPE), dtype=torch.float16, tolerance=5e-3, least=1.0)
    close(Problem(rows=20, keys=20), dtype=torch.float16, tolerance=5e-3, least=1.0)


def test_small_gradients_survive_half_precision():
    problem = Problem(adapter=DAPE)
    tensors, modules, _, _ = drawn(problem)
    tensors, (bias, adapter), _ = leaves(tensors, modules, torch.float16)
    bias, adapter = bias.float(), adapter.float()
    out = dape.attention(*tensors, bias, adapter, backend="triton")
    weight = torch.randn_like(out)
    sums = [
        torch.autograd.grad(out, [*adapter.parameters()], weight * size, retain_graph=True)
        for size in (1.0, 2.0**-12)
    ]
    for large, small in zip(*sums, strict=True):
        assert_close(small * 2.0**12, large, rtol=1e-2, atol=1e-3)


def test_two_backward_passes_agree_bit_for_bit(narrow_bands):
    given = drawn(Problem(rows=40, keys=40, adapter=DAPE))
    problem = Problem(rows=40, keys=40, adapter=DAPE)
    runs = [solve(problem, *given, "triton", torch.float32)[1] for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


class RowBias(Bias):
    """Says nothing of what B depends on."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": dape.DAPE(4, kernel_size=3), "bias": dape.FIRE(4)}, "kernel_size=3"),
        ({"adapter": dape.DAPE(4, 33, kernel_size=3)}, "256 padded channels, more than 128"),
        ({"adapter": torch.nn.Identity()}, "do not know the adapter Identity"),
        ({"bias": RowBias(4)}, "RowBias depends on more than the distance"),
        ({"query_positions": torch.arange(7)}, "positions are given"),
        ({"mask": torch.ones(1, 1, 7, 7, dtype=torch.bool)}, "the mask differs between queries"),
        ({"query_offset": torch.tensor(0)}, "query_offset is a tensor"),
    ],
)
def test_what_it_cannot_serve_is_refused_in_a_line(options, message):
    query, key, value = Problem().tensors(torch.float32)
    with pytest.raises(UserError, match=rf"backend='triton' cannot serve this call: .*{message}"):
        dape.attention(query, key, value, backend="triton", **options)


def changed_by_weight_norm(bias, adapter):
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(adapter, "weight_in")
    torch.nn.init.constant_(adapter.weight_in_g, 3.0)


def changed_by_pruning(bias, adapter):
    torch.nn.utils.prune.random_unstructured(adapter, "weight_out", 0.5)
    torch.nn.init.constant_(adapter.weight_out_orig, 2.0)


def changed_by_a_hook(bias, adapter):
    bias.register_forward_hook(lambda module, given, found: 3 * found)


@pytest.mark.parametrize("change", [changed_by_weight_norm, changed_by_pruning, changed_by_a_hook])
def test_modules_with_hooks_are_called(change, monkeypatch):
    """The kernels read old weights, or left out the hook."""
    (query, key, value), (bias, adapter) = Problem().tensors(), (dape.Kerple(4), dape.DAPE(4, 5))
    change(bias, adapter)
    delta = (torch.arange(7)[:, None] - torch.arange(7)).double()
    scores, values = query @ key.mT / 3**0.5, bias(torch.arange(7), torch.arange(7)).double()
    expected = adapter(scores, values).masked_fill(delta < 0, -torch.inf).softmax(-1) @ value
    # As on a GPU, `auto` asks the fused kernels first.
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"]._replace(gpu_only=False))
    given = query.float(), key.float(), value.float(), bias, adapter
    assert_close(dape.attention(*given).double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="has hooks, and the kernels call no module"):
        dape.attention(*given, backend="triton")


DRAWS = 4


def close_as_the_textbook(scheme, backend, dtype, rows, device):
    """Compare output and gradients with float64, by the textbook's own errors in the same dtype.

    Mixed scores pass through a scratch in fp16 and products that are summed in it, so that in fp16
    they are as exact as in bf16: no worse than the textbook in bf16. Means of a few draws are
    compared, because one error of a tensor of 12 numbers is a matter of chance.
    """
    case = Case(scheme, 12, 64, rows, 2, dtype, torch.device(device), 0)
    parts, ours, theirs = build(case), Counter(), Counter()
    attend = partial(dape.attention, bias=parts.bias, adapter=parts.adapter, backend=backend)
    yardstick = torch.bfloat16 if parts.adapter is not None else DTYPES[dtype]
    for inputs in draw(case, DRAWS):
        truth = parity.Truth.of(case, parts, inputs)
        ours.update(truth.errors_of(attend, TRAINING))
        textbook = parity.by_rows(case, parts, inputs, yardstick)
        for name, error in parity.errors(textbook, truth.tensors).items():
            theirs[name] += parity.ZERO_LIMIT if parity.vanishes(name, truth.tensors) else error
    for name, error in theirs.items():
        assert ours[name] <= error, name


@pytest.mark.gpu
@pytest.mark.parametrize(
    "scheme", ["kerple", "dape-kerple", "dape3-kerple", "talking-heads-kerple"]
)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("rows", [129, 512])
def test_on_a_gpu_it_is_as_exact_as_the_textbook(scheme, backend, dtype, rows):
    close_as_the_textbook(scheme, backend, dtype, rows, "cuda")


def gradients_of(tables, tensors, grad_out, causal=True, offset=0, mask=None):
    """Return the gradients of Q, K, V and of the last table."""
    given = [x.detach().requires_grad_() for x in (*tensors, *tables)]
    out, *_ = fused(*given[:3], given[3:], mask, 0.5, causal, offset, "triton", False)
    return torch.autograd.grad(out, [*given[:3], given[-1]], grad_out)


@pytest.mark.parametrize("parameters", [1, 2])
@pytest.mark.parametrize(
    ("causal", "rows", "keys", "offset", "masked"),
    [(True, 70, 70, 0, True), (True, 33, 140, 107, False), (False, 130, 21, 4, False)],
)
def test_a_jacobian_gives_the_gradient_of_parameters(
    parameters, causal, rows, keys, offset, masked
):
    """It is the gradient of the table, along diagonals, times the Jacobian."""
    sizes = (2, 4, rows, 16), (2, 2, keys, 16), (2, 2, keys, 16)
    tensors, grad_out = [torch.randn(size) for size in sizes], torch.randn(sizes[0])
    mask = torch.rand(2, keys) < 0.7 if masked else None
    table, jacobian = torch.randn(4, 200), torch.randn(parameters, 4, 200)
    how = grad_out, causal, offset, mask
    *expected, of_table = gradients_of([table], tensors, *how)
    expected.append(torch.einsum("hn,phn->ph", of_table, jacobian))
    given = table, jacobian, torch.zeros(parameters, 4)
    for found, true in zip(gradients_of(given, tensors, *how), expected, strict=True):
        assert_close(found, true, rtol=1e-4, atol=1e-5 * true.abs().max().item())


def test_the_error_of_the_output_hardly_reaches_the_gradient_of_parameters():
    """The gradient of a constant of every key is zero, and what is left of it is error."""
    problem, table = Problem(batch=4, rows=64, keys=64), torch.zeros(4, 64)
    query, key, value = problem.tensors()
    tensors = [x.half() for x in (query / 10, key, value + 4)]
    grad_out = torch.randn_like(tensors[0])
    *_, of_table = gradients_of([table], tensors, grad_out)
    *_, found = gradients_of([table, torch.ones(1, 4, 64), torch.zeros(1, 4)], tensors, grad_out)
    assert found.norm() < 1e-6 * of_table.abs().sum(1).norm()


@pytest.mark.parametrize("adapter", [None, DAPE], ids=["static", "dape"])
def test_rounding_of_the_output_hardly_reaches_the_sums_of_tables(adapter):
    """The gradient of a constant of every key is zero, and what is left of it is error.

    Values have a mean and many keys a weight, so that the error of the output stands out.
    """
    problem = Problem(batch=4, rows=64, keys=64, adapter=adapter)

    def error(exact, seed):
        torch.manual_seed(seed)
        query, key, value = problem.tensors()
        tensors, (bias, adapter), _ = leaves(
            [query / 10, key, value + 4], problem.modules(), torch.float16
        )
        if adapter is None:
            bias.requires_grad_(False)
        found = operator.tables(bias.float(), adapter and adapter.float(), 4, 64, query.device)
        tables = [x.detach().requires_grad_() for x in found]
        out, *_ = fused(*tensors, tables, None, 0.5, True, 0, "triton", exact)
        (gradient,) = torch.autograd.grad(out, tables[:1], torch.randn_like(out))
        return gradient.sum(1).norm() / gradient.abs().sum(1).norm()

    if adapter is None:
        assert error(True, 0) < 1e-6
    else:
        with_rest, without = (sum(error(exact, n) for n in range(3)) for exact in (True, False))
        assert with_rest < 0.4 * without
