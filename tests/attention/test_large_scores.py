"""Scores are those of PyTorch's own attention, however large: never rounded before the scale."""

import pytest
import torch
from problems import blocks_of
from torch.nn.functional import scaled_dot_product_attention

import dape

BACKENDS = ("reference", "chunked")
DTYPES = (torch.float16, torch.bfloat16)


def constant(dtype):
    """Return inputs whose products overflow fp16 and lie 512 apart in bf16."""
    query, key, value = torch.randn(3, 1, 2, 40, 64)
    query[..., :4], key[..., :4] = 150.0, 150.0
    return [x.to(dtype) for x in (query, key, value)]


def shifted(dtype, size=30.0):
    """Return queries and keys with a large mean, as those of models with a bias in k_proj."""
    query, key, value = torch.randn(3, 1, 12, 96, 64)
    return [x.to(dtype) for x in (query + size, key + size / 4, value)]


def solved(attend, tensors, dtype, cotangent):
    """Return the output and the gradients of all tensors."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out = attend(*leaves)
    return [out, *torch.autograd.grad(out, leaves, cotangent.to(dtype))]


def errors(found, exact):
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)]


def beside_sdpa(tensors, backend, parts=(None, None)):
    """Return our errors and those of PyTorch's attention, with B as its mask, against float64."""
    dtype, length = tensors[0].dtype, tensors[0].shape[2]
    cotangent, positions = torch.randn_like(tensors[2]), torch.arange(length)
    hidden = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    if parts[0] is not None:
        hidden = hidden + parts[0](positions, positions).double().detach()

    def sdpa(*qkv):
        return scaled_dot_product_attention(*qkv, attn_mask=hidden.to(qkv[0].dtype))

    def ours(*qkv):
        with blocks_of(2**12):
            return dape.attention(*qkv, *parts, backend=backend)

    exact = solved(sdpa, tensors, torch.float64, cotangent)
    return [errors(solved(f, tensors, dtype, cotangent), exact) for f in (ours, sdpa)]


def silent(heads):
    """Return an adapter that adds nothing: its last layer is zero."""
    adapter = dape.DAPE(heads)
    for parameter in (adapter.weight_out, adapter.bias_out):
        torch.nn.init.zeros_(parameter)
    return adapter


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draw", [constant, shifted, lambda dtype: shifted(dtype, 100.0)])
def test_large_scores_are_as_exact_as_in_pytorch(draw, backend, dtype):
    for ours, theirs in zip(*beside_sdpa(draw(dtype), backend), strict=True):
        assert ours <= 1.5 * theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_silent_adapter_changes_nothing_of_large_scores(backend, dtype):
    parts = dape.Kerple(12), silent(12)
    found, _ = beside_sdpa(shifted(dtype), backend, parts)
    assert max(found) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_with_a_large_mean_leave_gradients_exact(backend, dtype):
    """dS = P (dP - delta): what rounding takes from dP would not cancel."""
    query, key, value = torch.randn(3, 1, 2, 40, 64)
    tensors = [x.to(dtype) for x in (query, key, value + 30)]
    for ours, theirs in zip(*beside_sdpa(tensors, backend), strict=True):
        assert ours <= 1.5 * theirs
