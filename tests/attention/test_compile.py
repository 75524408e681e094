"""`dape.attention` under `torch.compile`: one graph, the same numbers."""

import pytest
import torch
from problems import blocks_of
from torch.testing import assert_close

import dape


@pytest.mark.unhooked
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_two_chunks_compile_to_one_graph_with_the_same_numbers(kernel_size):
    torch.compiler.reset()
    parts = [dape.Kerple(4).double(), dape.DAPE(4, 6, kernel_size).double()]
    qkv = [x.requires_grad_() for x in torch.randn(3, 1, 4, 9, 8, dtype=torch.float64)]
    parameters = [p for part in parts for p in part.parameters()]

    def run(attention):
        out = attention(*qkv, *parts, backend="chunked")
        return out, *torch.autograd.grad(out.square().sum(), [*qkv, *parameters])

    with blocks_of(4 * 9 * 5):
        compiled = run(torch.compile(dape.attention, fullgraph=True, backend="aot_eager"))
        for ours, theirs in zip(compiled, run(dape.attention), strict=True):
            assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
