"""Transformer-XL's terms against its sum, one pair at a time, with r(i - j) written out."""

import math

import pytest
import torch
from rows import draw
from torch.testing import assert_close

import dape
from dape.errors import UserError
from dape.positions.adapter import TransformerXL


def sinusoid(offset, size):
    angles = [offset / 10000 ** (2 * f / size) for f in range(size // 2)]
    waves = [math.sin(x) for x in angles] + [math.cos(x) for x in angles]
    return torch.tensor(waves, dtype=torch.float64)


def terms(weight, u, v, rows):
    """scale (u . k_j + (q_i + v) . W r(i - j))."""
    batch, heads, queries, _ = rows.query.shape
    kv_heads, keys = rows.key.shape[1:3]
    out = rows.query.new_zeros(batch, heads, queries, keys)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        query_at = rows.query_positions.expand(batch, -1)[b, i]
        key_at = rows.key_positions.expand(batch, -1)[b, j]
        r = sinusoid(int(query_at - key_at), weight.shape[2])
        key = rows.key[b, h // (heads // kv_heads), j]
        out[b, h, i, j] = u[h] @ key + (rows.query[b, h, i] + v[h]) @ (weight[h] @ r)
    return rows.scale * out


@pytest.mark.parametrize(
    "positions",
    [None, torch.tensor([40, 3, 9000, 16_384, 7, 7, 0]), torch.randint(0, 500, (2, 7))],
    ids=["in order", "any", "batched"],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_values_and_gradients_are_those_of_the_sum_over_signed_offsets(positions, kv_heads):
    scores, bias, rows = draw(kv_heads=kv_heads, causal=False, positions=positions)
    adapter = TransformerXL(4, 3, 10).double()
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    leaves = [*adapter.parameters(), rows.query.requires_grad_(), rows.key.requires_grad_()]
    ours = adapter(scores.detach(), bias, rows)
    theirs = scores.detach() + bias + terms(*adapter.parameters(), rows)
    assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    coefficients = torch.randn_like(ours)
    for our, their in zip(
        *(torch.autograd.grad((x * coefficients).sum(), leaves) for x in (ours, theirs)),
        strict=True,
    ):
        assert_close(our, their, rtol=1e-10, atol=1e-10)


def test_far_offsets_are_exact_in_float32_and_with_a_bfloat16_model():
    positions = torch.tensor([0, 255, 256, 257, 16_127, 16_382, 16_383])
    _, _, rows = draw(positions=positions, causal=False, dtype=torch.bfloat16)
    adapter = TransformerXL(4, 3, 64)
    zero = torch.zeros(2, 4, 5, 7)
    exact = terms(
        *(p.detach().double() for p in adapter.parameters()),
        rows._replace(query=rows.query.double(), key=rows.key.double()),
    )
    ours = adapter(zero, zero, rows)
    assert ours.dtype == torch.float32
    assert_close(ours.double(), exact, rtol=0, atol=2e-7)
    # Neighbours that bfloat16 holds to be the same position.
    assert (ours[..., 1:3].diff().abs() > 1e-6).any() and (ours[..., 5:].diff().abs() > 1e-6).any()


def test_the_paper_s_size_has_a_matrix_for_each_head_and_two_vectors():
    adapter = dape.TransformerXL(num_heads=12, head_dim=64, hidden_size=768)
    assert sum(p.numel() for p in adapter.parameters()) == 768 * 768 + 2 * 768
    assert_close(adapter.weight.std().item(), 0.02, rtol=0.01, atol=0)
    assert_close(adapter.u.std().item(), 0.02, rtol=0.1, atol=0)


def test_an_odd_width_is_refused():
    with pytest.raises(UserError, match="hidden_size=5 must be even and positive"):
        TransformerXL(1, 5, 5)
