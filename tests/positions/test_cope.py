"""CoPE against x-transformers and loops over the paper's sums of gates."""

import pytest
import torch
from rows import draw
from torch.testing import assert_close

import dape
from dape.errors import UserError
from dape.positions.adapter import CoPE


def added(table, scores, rows):
    """q_i . e[p_ij], one pair at a time; keys stand in the order of their positions."""
    batch, _, _, keys = scores.shape
    out = torch.zeros_like(scores)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
        query_at = rows.query_positions.expand(batch, -1)[b, i]
        key_at = rows.key_positions.expand(batch, -1)[b]
        low, high = sorted((int(query_at), int(key_at[j])))
        between = [k for k in range(keys) if low <= key_at[k] <= high and rows.visible[b, 0, i, k]]
        p = sum(torch.sigmoid(scores[b, h, i, k]) for k in between)
        p = torch.as_tensor(p, dtype=scores.dtype).clamp(max=len(table) - 1)
        floor = int(p)
        w, above = p - floor, min(floor + 1, len(table) - 1)
        e = (1 - w) * table[floor] + w * table[above]
        out[b, h, i, j] = rows.query[b, h, i] @ e
    return out


@pytest.mark.parametrize("npos_max", [1, 3, 64])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"padding": [0, 2]}, {"causal": False, "padding": [1, 3]}, {"rows": 1}],
)
def test_it_adds_what_the_loops_add_where_keys_are_visible(options, npos_max):
    scores, bias, rows = draw(**options)
    adapter = CoPE(3, npos_max).double()
    torch.nn.init.normal_(adapter.weight)
    expected = scores + bias + added(adapter.weight, scores, rows)
    seen = rows.visible.expand_as(scores)
    ours = adapter(scores, bias, rows)
    assert_close(ours[seen], expected[seen], rtol=1e-12, atol=1e-12)

    coefficients = torch.randn_like(scores) * seen
    for inputs in (adapter.weight, scores, rows.query):
        inputs.requires_grad_()
    sums = [
        (logits * coefficients).sum()
        for logits in (adapter(scores, bias, rows), added(adapter.weight, scores, rows) + scores)
    ]
    leaves = [adapter.weight, scores, rows.query]
    for our, their in zip(*(torch.autograd.grad(x, leaves) for x in sums), strict=True):
        assert_close(our, their, rtol=1e-11, atol=1e-11)


def test_the_place_of_a_batch_of_positions_is_its_own():
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])
    scores, bias, rows = draw(padding=[2, 0], positions=positions)
    adapter = CoPE(3).double()
    torch.nn.init.normal_(adapter.weight)
    seen = rows.visible.expand_as(scores)
    expected = scores + bias + added(adapter.weight, scores, rows)
    assert_close(adapter(scores, bias, rows)[seen], expected[seen], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_it_is_x_transformers_under_a_causal_mask():
    package = pytest.importorskip("x_transformers.x_transformers")
    scores, bias, rows = draw(kv_heads=4, rows=9, keys=9)
    theirs, ours = package.CoPE(3, 4, max_pos=6).double(), CoPE(3, 6).double()
    torch.nn.init.normal_(theirs.pos_emb)
    ours.load_state_dict({"weight": theirs.pos_emb})
    masked = scores.masked_fill(~rows.visible, torch.finfo(scores.dtype).min)
    seen = rows.visible.expand_as(scores)
    expected = scores + bias + theirs(rows.query, masked)
    assert_close(ours(scores, bias, rows)[seen], expected[seen], rtol=1e-12, atol=1e-12)


def test_without_training_it_adds_nothing():
    scores, bias, rows = draw()
    assert torch.equal(CoPE(3)(scores, bias, rows), scores + bias)


def test_open_gates_count_tokens_exactly_beyond_what_bfloat16_holds():
    _, _, rows = draw(
        batch=1, heads=1, kv_heads=1, rows=1, keys=400, head_dim=1, dtype=torch.bfloat16
    )
    adapter = CoPE(1, npos_max=350)
    with torch.no_grad():
        adapter.weight[:, 0] = torch.arange(350.0)
    scores = torch.full((1, 1, 1, 400), 60.0)  # sigmoid(60) = 1
    counted = adapter(scores, scores, rows) - 2 * scores
    tokens = torch.arange(400, 0, -1).clamp(max=349)
    assert_close(counted[0, 0, 0], tokens * rows.query.item(), rtol=1e-5, atol=0)


def test_64_embeddings_of_a_head_are_all_it_has():
    assert sum(p.numel() for p in dape.CoPE(head_dim=64).parameters()) == 64 * 64


def test_no_embedding_is_refused():
    with pytest.raises(UserError, match="npos_max=0 must be at least 1"):
        CoPE(4, 0)
