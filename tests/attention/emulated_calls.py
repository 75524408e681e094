"""Calls by the CUDA kernels on a CPU, beside the textbook in float64 and in bf16."""

import copy
import shutil

import pytest
import torch
from problems import fused as operate

import dape
from dape.attention.fused import operator, overflow

MARKS = [
    pytest.mark.unhooked,
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    # The interpreter's own warnings, of NumPy: the kernels of one head are Triton's.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


def drawn(problem):
    """Return query, key, value, the keys that are seen, the bias and the adapter."""
    return *problem.tensors(torch.float32), problem.draw_mask(), *problem.modules()


def tables_of(problem, bias, adapter):
    count = max(problem.keys - min(0, problem.query_offset), problem.rows + problem.query_offset)
    return operator.tables(bias, adapter, problem.heads, count, torch.device("cpu"))


def textbook(problem, query, key, value, seen, bias, adapter):
    mask = None if seen is None else seen[:, None, None]
    return dape.attention(
        query, key, value, bias, adapter, mask=mask, causal=problem.causal,
        query_offset=problem.query_offset, backend="reference", return_lse=True,
    )  # fmt: skip


def solve(problem, given=None):
    """Return output and gradients: the kernels' in fp16, the textbook's in float64 and bf16."""
    *tensors, seen, bias, adapter = drawn(problem) if given is None else given
    weight = torch.randn_like(tensors[0])

    def solution(attend, dtype, bias, adapter):
        inputs = [x.to(dtype).requires_grad_() for x in tensors]
        parameters = [*bias.named_parameters(), *adapter.named_parameters()]
        used = [p for name, p in parameters if name != "bias_out"]  # whose gradient is zero
        out = attend(*inputs, bias, adapter)
        return [out, *torch.autograd.grad(out, [*inputs, *used], weight.to(dtype))]

    def fused(query, key, value, bias, adapter):
        how = (problem.head_dim**-0.5, problem.causal, problem.query_offset, "cuda", True)
        return operate(query, key, value, tables_of(problem, bias, adapter), seen, *how)[0]

    def exact(query, key, value, bias, adapter):
        return textbook(problem, query, key, value, seen, bias, adapter)[0]

    doubles = copy.deepcopy(bias).double(), copy.deepcopy(adapter).double()
    return (
        solution(fused, torch.float16, bias, adapter),
        solution(exact, torch.float64, *doubles),
        solution(exact, torch.bfloat16, bias, adapter),
    )


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def check(problem, given=None):
    """Compare with float64, by the errors of the textbook in bf16.

    A hidden unit that is zero but for rounding has one of two slopes, which is much in gradients of
    so few keys; a wrong kernel is off by 30 times the textbook's error.
    """
    for i, (found, exact, rounded) in enumerate(zip(*solve(problem, given), strict=True)):
        assert relative(found, exact) <= (2 if i < 4 else 4) * relative(rounded, exact)


@torch.no_grad()
def check_large_sums(problem, given):
    """Check that large log-sum-exps set the flag if weights learn, and else leave 16 bits right.

    Compare with the error of the textbook in float32.
    """
    query, key, value, seen, bias, adapter = given
    halves = [x.half() for x in (query, key, value)]
    how = problem.head_dim**-0.5, problem.causal, problem.query_offset, "cuda"
    tables = tables_of(problem, bias, adapter)
    assert operate(*halves, tables, seen, *how, True)[3].tolist() == [1]
    out, lse, _, flag = operate(*halves, tables, seen, *how, False)
    assert flag.tolist() == [0] and lse.abs().min() > overflow.LARGEST_SUM
    doubles = [x.double() for x in halves], copy.deepcopy(bias).double(), copy.deepcopy(adapter)
    exact = textbook(problem, *doubles[0], seen, doubles[1], doubles[2].double())[0]
    rounded = textbook(problem, *(x.float() for x in halves), seen, bias, adapter)[0]
    assert relative(out, exact) <= 1e-3 + 4 * relative(rounded, exact)


def solve_seeded(problem):
    """Return output and gradients of the kernels, with equal draws in every call."""
    torch.manual_seed(0)
    return solve(problem)[0]


def check_repeats(problem):
    """Two runs agree bit for bit."""
    runs = [solve_seeded(problem) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
