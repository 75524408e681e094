"""Random attention problems, and their solution by the package and by the textbook."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

import dape
import textbook
from dape.attention import chunked
from dape.positions.bias import ALiBi, Kerple


@dataclass(frozen=True)
class Problem:
    """Sizes and options of one call."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    rows: int = 7
    keys: int = 7
    head_dim: int = 3
    value_dim: int = 3
    causal: bool = True
    scale: float | None = None
    query_offset: int = 0
    mask: str | None = None  # left, right, rows (4-D), shared (4-D, batch 1), keys (4-D, one row)
    positions: str | None = None  # shared or batched
    bias: str | None = "kerple"
    # Arguments of DAPE: hidden, kernel_size, residual, inputs; or that heads talk.
    adapter: tuple | str | None = None

    def tensors(self, dtype=torch.float64):
        query = torch.randn(self.batch, self.heads, self.rows, self.head_dim)
        key = torch.randn(self.batch, self.kv_heads, self.keys, self.head_dim)
        value = torch.randn(self.batch, self.kv_heads, self.keys, self.value_dim)
        return [x.to(dtype) for x in (query, key, value)]

    def modules(self):
        bias = {"alibi": ALiBi, "kerple": Kerple, None: lambda heads: None}[self.bias](self.heads)
        if self.adapter == "talking-heads":
            adapter = dape.TalkingHeads(self.heads)
            torch.nn.init.normal_(adapter.weight)
            return bias, adapter
        return bias, self.adapter and dape.DAPE(self.heads, *self.adapter)

    def draw_mask(self):
        padding = torch.randint(0, self.keys, (self.batch, 1))
        slots = torch.arange(self.keys)
        shape = {"rows": (self.batch, 1, self.rows), "shared": (1, 1, self.rows)}
        return {
            None: None,
            "left": slots >= padding,
            "right": slots < self.keys - padding,
            "keys": (slots >= padding)[:, None, None],
        }.get(self.mask, torch.rand(*shape.get(self.mask, ()), self.keys) < 0.6)

    def draw_positions(self):
        if self.positions is None:
            return None, None
        lead = () if self.positions == "shared" else (self.batch,)
        return torch.randint(0, 40, (*lead, self.rows)), torch.randint(0, 40, (*lead, self.keys))


@contextmanager
def blocks_of(scores):
    """Let the chunked backend hold only so many scores at once, a row at least."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunked.SCORES_PER_BLOCK, "cpu", scores)
        yield


def leaves(tensors, modules, dtype=None):
    """Copies that collect gradients: of the tensors, and of the modules' parameters."""
    tensors = [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in tensors]
    modules = [
        copy.deepcopy(m) if dtype is None or m is None else copy.deepcopy(m).to(dtype)
        for m in modules
    ]
    parameters = [p for m in modules if m is not None for p in m.parameters()]
    return tensors, modules, parameters


def solve(problem, tensors, modules, mask, positions, backend, dtype=None):
    """Return output and gradients of a fixed random functional of it, by the package."""
    tensors, (bias, adapter), parameters = leaves(tensors, modules, dtype)
    with blocks_of(50):
        out = dape.attention(
            *tensors, bias=bias, adapter=adapter, causal=problem.causal, scale=problem.scale,
            query_offset=problem.query_offset, backend=backend, mask=mask,
            query_positions=positions[0], key_positions=positions[1],
        )  # fmt: skip
        return out, differentiate(out, [*tensors, *parameters])


def solve_by_textbook(problem, tensors, modules, mask, positions):
    """Return the same in float64 by the textbook."""
    tensors, (bias, adapter), parameters = leaves(tensors, modules, torch.float64)
    slots = torch.arange(problem.rows) + problem.query_offset
    rows, keys = (
        slots if positions[0] is None else positions[0],
        torch.arange(problem.keys) if positions[1] is None else positions[1],
    )
    out, _ = textbook.attention(
        *tensors,
        visible(problem, mask),
        rows.expand(problem.batch, -1),
        keys.expand(problem.batch, -1),
        bias_formula(bias),
        adapter_formula(adapter),
        problem.scale,
    )
    return out, differentiate(out, [*tensors, *parameters])


def drawn(problem, dtype=torch.float64):
    """Return what `solve` takes: tensors of values that `dtype` has, modules, a mask, positions."""
    tensors = [x.to(dtype).double() for x in problem.tensors()]
    return tensors, problem.modules(), problem.draw_mask(), (None, None)


def close(problem, backend="triton", dtype=torch.float32, tolerance=1e-4, least=0.1):
    """Compare the output and all gradients with the textbook's, by the size of the largest.

    `least` is a size that counts: the gradient of a constant of every key is zero but for rounding.
    """
    given = drawn(problem, dtype)
    out, gradients = solve(problem, *given, backend, dtype)
    true_out, true_gradients = solve_by_textbook(problem, *given)
    for found, true in zip([out, *gradients], [true_out, *true_gradients], strict=True):
        scale = max(least, true.abs().max().item())
        assert_close(found.double(), true, rtol=0, atol=tolerance * scale)


def visible(problem, mask):
    """Return [B, Tq, Tk] from the definitions of `causal`, `query_offset` and the mask's shapes."""
    seen = torch.ones(problem.batch, problem.rows, problem.keys, dtype=torch.bool)
    for i in range(problem.rows):
        for j in range(problem.keys):
            if problem.causal and j > i + problem.query_offset:
                seen[:, i, j] = False
    if mask is None:
        return seen
    return seen & (mask[:, None] if mask.ndim == 2 else mask[:, 0])


def bias_formula(bias):
    if isinstance(bias, Kerple):
        return textbook.kerple(*((1 + raw.exp()).log() for raw in (bias.raw_p, bias.raw_a)))
    return bias and textbook.alibi(textbook.alibi_slopes(bias.num_heads))


def adapter_formula(adapter):
    if adapter is None:
        return None
    if isinstance(adapter, dape.TalkingHeads):
        return textbook.talking_heads(adapter.weight)
    weights = (adapter.weight_in, adapter.bias_in, adapter.weight_out, adapter.bias_out)
    if adapter.kernel_size > 1:
        return textbook.dape_v2(*weights, adapter.inputs, adapter.residual)
    weights = [w.squeeze(-1) if w.ndim == 3 else w for w in weights]
    return textbook.dape(*weights, adapter.inputs, adapter.residual)


def fused(query, key, value, tables, mask, scale, causal, offset, backend, exact):
    """Return what the fused operator does, of a call without a halo."""
    from dape.attention.fused import operator

    how = (*operator.NO_RECIPE, scale, causal, offset, (0, 0), backend, exact)
    return operator.forward_operator(query, key, value, tables, [], mask, None, *how)[:4]


def differentiate(out, leaves):
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    nothing = sum(0 * leaf.sum() for leaf in leaves)  # where no query sees a key
    return torch.autograd.grad((out * cotangent).sum() + nothing, leaves)


class Rounding(torch.autograd.Function):
    """x in a dtype, and its gradient as it is."""

    @staticmethod
    def forward(ctx, x, dtype):
        return x.to(dtype).to(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class RoundedScores(torch.nn.Module):
    """An adapter that is given scores in fp16, as they stand in the scratch of fused kernels.

    The gradient of a hidden unit turns where the unit's sign does: rounding turns a few, and their
    sums are that far off, whoever rounds.
    """

    def __init__(self, adapter):
        super().__init__()
        self.adapter = adapter

    def forward(self, scores, bias):
        return self.adapter(Rounding.apply(scores, torch.float16), bias)
