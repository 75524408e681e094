"""Positions, biases, logits and softmax stay in float32 whatever the dtype around them."""

import pytest
import torch
from problems import blocks_of
from torch.testing import assert_close

import dape

BACKENDS = ("reference", "chunked")


class Recorder(torch.nn.Module):
    """An adapter that keeps what it was given."""

    def forward(self, scores, bias):
        self.scores, self.bias, self.logits = scores.detach(), bias.detach(), scores + bias
        return self.logits


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_gets_scores_and_bias_in_float32(dtype, autocast):
    recorder, bias = Recorder(), dape.Kerple(4)
    query, key, value = torch.randn(3, 1, 4, 9, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = dape.attention(query, key, value, bias=bias, adapter=recorder)
    assert (recorder.scores.dtype, recorder.bias.dtype) == (torch.float32, torch.float32)
    assert torch.equal(recorder.bias, bias(torch.arange(9), torch.arange(9)))
    assert out.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_autocast_changes_nothing(kernel_size, backend):
    parts = [dape.Kerple(4), dape.DAPE(4, kernel_size=kernel_size)]
    parameters = [p for part in parts for p in part.parameters()]
    qkv = [x.requires_grad_() for x in torch.randn(3, 1, 4, 9, 8)]

    def run(autocast):
        with blocks_of(80), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = dape.attention(*qkv, *parts, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), [*qkv, *parameters])

    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(run(True), run(False), strict=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_256_and_257_differ_in_half_precision(dtype, backend):
    query, key = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4)
    value = torch.tensor([1.0, 0.0])[None, None, :, None]
    out = dape.attention(
        *(x.to(dtype) for x in (query, key, value)), bias=dape.ALiBi(1), causal=False,
        backend=backend, query_positions=torch.tensor([4357]),
        key_positions=torch.tensor([4101, 4100]),
    )  # fmt: skip
    slope = 2.0**-8  # of one head
    expected = torch.tensor(slope).sigmoid()  # of distances 256 and 257
    assert expected > 0.5009
    assert_close(out.squeeze(), expected.to(dtype), rtol=0, atol=0)
