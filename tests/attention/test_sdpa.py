"""PyTorch's own attention as a backend: the textbook's numbers, or a reason why not."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from problems import Problem, solve, solve_by_textbook
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import dape
from dape.attention import sdpa
from dape.attention.call import Call
from dape.errors import UserError

LINEAR = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
PLAIN = Problem(bias=None)
PROBLEMS = {
    "causal": PLAIN,
    "bidirectional": replace(PLAIN, causal=False),
    "grouped heads": replace(PLAIN, kv_heads=2),
    "one key head": replace(PLAIN, heads=5, kv_heads=1),
    "more keys than queries see": replace(PLAIN, rows=4, keys=11),
    "more queries than keys": replace(PLAIN, rows=9, keys=5),
    "cross lengths": replace(PLAIN, rows=5, keys=9, causal=False),
    "offset without causality": replace(PLAIN, causal=False, query_offset=3),
    "positions, which nothing reads": replace(PLAIN, positions="batched"),
    "one token": replace(PLAIN, rows=1, keys=1),
    "one query of many": replace(PLAIN, rows=1, keys=9, query_offset=8),
    "queries behind the keys": replace(PLAIN, rows=3, keys=5, query_offset=4),
    "scale": replace(PLAIN, scale=0.3),
    "several blocks": replace(PLAIN, batch=1, heads=2, kv_heads=1, rows=70, keys=130),
}


def drawn(problem, dtype):
    return problem.tensors(dtype), (None, None), None, problem.draw_positions()


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_it_serves_equals_the_textbook_without_a_whole_matrix(name):
    given = drawn(PROBLEMS[name], torch.float64)
    expected, gradients = solve_by_textbook(PROBLEMS[name], *given)
    with sdpa_kernel(LINEAR):
        out, ours = solve(PROBLEMS[name], *given, "sdpa")
    assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(ours, gradients, strict=True):
        assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_that_is_not_positive_goes_to_another_backend(scale):
    """PyTorch scales the -inf of causality too, and returns NaN."""
    problem = replace(PLAIN, scale=scale)
    given = drawn(problem, torch.float64)
    with pytest.raises(UserError, match="sdpa want a positive scale"):
        solve(problem, *given, "sdpa")
    expected, gradients = solve_by_textbook(problem, *given)
    out, ours = solve(problem, *given, "auto")
    for mine, theirs in zip([out, *ours], [expected, *gradients], strict=True):
        assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_near_the_textbook(dtype):
    problem = replace(PLAIN, kv_heads=2, rows=13, keys=13, head_dim=16, value_dim=16)
    given = drawn(problem, dtype)
    expected, gradients = solve_by_textbook(problem, *given)
    out, ours = solve(problem, *given, "sdpa")
    assert out.dtype == dtype
    for mine, theirs in zip([out, *ours], [expected, *gradients], strict=True):
        error = torch.linalg.norm(mine.double() - theirs) / torch.linalg.norm(theirs)
        assert error < 8 * torch.finfo(dtype).eps


def test_autocast_changes_nothing():
    query, key, value = PLAIN.tensors(torch.float32)
    expected = dape.attention(query, key, value, backend="sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dape.attention(query, key, value, backend="sdpa"), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": dape.Kerple(4)}, "sdpa knows neither a bias nor an adapter"),
        ({"adapter": dape.DAPE(4)}, "sdpa knows neither a bias nor an adapter"),
        ({"mask": torch.ones(2, 7, dtype=torch.bool)}, "a mask would exclude the fast"),
        ({"query_offset": 1}, "the causality of sdpa knows no query_offset"),
        ({"query_offset": -3}, "the causality of sdpa knows no query_offset"),
        ({"query_offset": torch.tensor(0)}, "the causality of sdpa knows no query_offset"),
        ({"return_lse": True}, "it returns no log-sum-exp"),
        ({"value": torch.zeros(2, 4, 7, 5)}, "the kernels of sdpa want values as wide as queries"),
        (
            {"value": torch.zeros(2, 4, 7, 3).half()},
            r"the query is torch\.float32, but the value torch\.float16",
        ),
    ],
)
def test_what_it_does_not_serve_is_refused_in_a_line_and_served_by_auto(options, message):
    query, key, value = PLAIN.tensors(torch.float32)
    given = {"query": query, "key": key, "value": value} | options
    refusal = rf"^backend='sdpa' cannot serve this call: {message}.*; use 'auto'$"
    with pytest.raises(UserError, match=refusal):
        dape.attention(**given, backend="sdpa")
    found, expected = (dape.attention(**given, backend=name) for name in ("auto", "chunked"))
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("head_dim", [20, 64, 128, 256])
def test_on_a_gpu_what_it_serves_needs_no_whole_matrix(dtype, kv_heads, head_dim):
    problem = replace(
        PLAIN, kv_heads=kv_heads, rows=70, keys=130, head_dim=head_dim, value_dim=head_dim
    )
    query, key, value = (x.cuda().requires_grad_() for x in problem.tensors(dtype))
    if reason := sdpa.obstacle(Call(query, key, value)):
        single = dtype == torch.float32 and kv_heads == 2
        assert head_dim == 20 or dtype == torch.float64 or single, reason
        return
    with sdpa_kernel(LINEAR):
        out = dape.attention(query, key, value, backend="sdpa")
        out.sum().backward()
    expected = dape.attention(*(x.double() for x in (query, key, value)), backend="reference")
    error = torch.linalg.norm(out.double() - expected) / torch.linalg.norm(expected)
    assert error < 8 * torch.finfo(torch.float16 if dtype is torch.float32 else dtype).eps


ENDING = replace(PLAIN, batch=1, rows=70, keys=130, query_offset=60, head_dim=16, value_dim=16)


def ends_together(dtype, device):
    """Return the output of the textbook in float64, and of PyTorch's kernels, with gradients."""
    tensors = [x.to(device, dtype).requires_grad_() for x in ENDING.tensors(torch.float64)]
    call = Call(*tensors, causal=True, scale=0.25, query_offset=60)
    outs = (
        sdpa.attend(call).out,
        dape.attention(
            *(x.double() for x in tensors), scale=0.25, query_offset=60, backend="reference"
        ),
    )
    weights = torch.randn_like(outs[1])
    return call, [
        (out.double(), *torch.autograd.grad((out.double() * weights).sum(), tensors))
        for out in outs
    ]


def test_queries_that_end_with_the_keys_are_causal_from_there():
    call, (found, expected) = ends_together(torch.float64, "cpu")
    for ours, right in zip(found, expected, strict=True):
        assert_close(ours, right, rtol=1e-10, atol=1e-10)
    assert "query_offset" in sdpa.obstacle(call), "on a CPU by a whole matrix"


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("rows", "keys", "compiled", "reason"),
    [
        (70, 130, False, None),
        (70, 130, True, "the causality of sdpa with a query_offset breaks a compiled graph"),
        (130, 130, True, None),
        (130, 70, False, "the causality of sdpa knows no query_offset"),  # queries without keys
    ],
)
def test_on_a_gpu_they_are_refused_in_compiled_code_and_without_keys(
    monkeypatch, rows, keys, compiled, reason
):
    def tensor(length):
        shape = torch.Size((1, 4, length, 16))
        return SimpleNamespace(shape=shape, device=torch.device("cuda"), dtype=torch.float16)

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    call = Call(tensor(rows), tensor(keys), tensor(keys), query_offset=keys - rows)
    assert sdpa.obstacle(call) == reason


@pytest.mark.gpu
def test_on_a_gpu_they_have_a_fast_kernel():
    call, (found, expected) = ends_together(torch.bfloat16, "cuda")
    assert sdpa.obstacle(call) is None
    for ours, right in zip(found, expected, strict=True):
        assert_close(ours.double(), right.double(), rtol=2e-2, atol=2e-2)
