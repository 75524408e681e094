"""What holds whatever the numbers: causality, shifts, chunks, caches, padding, length."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import blocks_of
from torch.testing import assert_close

import dape
from dape.attention.call import visibility
from dape.positions.adapter import Rows

HEADS = 3
BACKENDS = ("reference", "chunked")
modules = st.sampled_from(
    [
        (None, None),
        ("ALiBi", None),
        ("Kerple", None),
        ("Kerple", {}),
        ("Kerple", {"kernel_size": 3}),
        ("ALiBi", {"kernel_size": 5, "residual": False}),
        (None, {"kernel_size": 7, "inputs": "scores"}),
    ]
)
calls = given(
    names=modules,
    backend=st.sampled_from(BACKENDS),
    length=st.integers(2, 17),
    at=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**31),
)


def build(names):
    bias, options = names
    bias = bias and getattr(dape, bias)(HEADS).double()
    return bias, None if options is None else dape.DAPE(HEADS, 4, **options).double()


def draw(names, length, seed):
    """Return query, key and value in float64, and bias and adapter."""
    torch.manual_seed(seed)
    return torch.randn(3, 2, HEADS, length, 4, dtype=torch.float64), build(names)


def attend(qkv, parts, backend="reference", **options):
    with blocks_of(60):
        return dape.attention(*qkv, *parts, backend=backend, **options)


@calls
def test_no_output_depends_on_later_keys(names, backend, length, at, seed):
    qkv, parts = draw(names, length, seed)
    cut = 1 + int(at * (length - 1))
    changed = qkv.clone()
    changed[:, :, :, cut:] = torch.randn_like(changed[:, :, :, cut:])
    before, after = (attend(x, parts, backend) for x in (qkv, changed))
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    assert not torch.equal(before[:, :, cut:], after[:, :, cut:])


@calls
def test_no_output_depends_on_the_length(names, backend, length, at, seed):
    qkv, parts = draw(names, length, seed)
    cut = 1 + int(at * (length - 1))
    whole, part = attend(qkv, parts, backend), attend(qkv[:, :, :, :cut], parts, backend)
    assert_close(whole[:, :, :cut], part, rtol=1e-12, atol=1e-12)


@calls
def test_shifting_every_position_changes_nothing(names, backend, length, at, seed):
    qkv, parts = draw(names, length, seed)
    positions = torch.randint(0, 100, (2, 2, length))
    query, key = positions + int(at * 5000)
    expected = attend(qkv, parts, backend, query_positions=positions[0], key_positions=positions[1])
    out = attend(qkv, parts, backend, query_positions=query, key_positions=key)
    assert torch.equal(out, expected)


@calls
def test_an_adapter_that_starts_at_zero_equals_the_bias_alone(names, backend, length, at, seed):
    qkv, (bias, adapter) = draw(names, length, seed)
    if adapter is None or not adapter.residual:
        adapter = dape.DAPE(HEADS).double()
    torch.nn.init.zeros_(adapter.weight_out)
    torch.nn.init.zeros_(adapter.bias_out)
    assert torch.equal(attend(qkv, (bias, adapter), backend), attend(qkv, (bias, None), backend))


@given(
    names=modules,
    lengths=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    scores=st.integers(1, 2000),
    causal=st.booleans(),
    offset=st.integers(-3, 9),
    seed=st.integers(0, 2**31),
)
def test_the_size_of_a_chunk_changes_nothing(names, lengths, scores, causal, offset, seed):
    (query, key, value), parts = draw(names, max(lengths), seed)
    qkv = query[:, :, : lengths[0]], key[:, :, : lengths[1]], value[:, :, : lengths[1]]
    options = {"causal": causal, "query_offset": offset}
    expected = dape.attention(*qkv, *parts, backend="reference", **options)
    with blocks_of(scores):
        out = dape.attention(*qkv, *parts, backend="chunked", **options)
    assert_close(out, expected, rtol=1e-12, atol=1e-12)


@calls
def test_decoding_with_a_cache_equals_one_pass(names, backend, length, at, seed):
    qkv, parts = draw(names, length, seed)
    expected = attend(qkv, parts, backend)
    cuts = [0, 1 + int(at * (length - 1)), length]
    for offset in (int, torch.tensor):
        pieces = [
            dape.attention(
                qkv[0][:, :, start:stop], *qkv[1:, :, :, :stop], *parts, backend=backend,
                query_offset=offset(start),
            )
            for start, stop in pairwise(cuts)
        ]  # fmt: skip
        assert_close(torch.cat(pieces, 2), expected, rtol=1e-12, atol=1e-12)


@calls
def test_left_padding_changes_nothing(names, backend, length, at, seed):
    qkv, parts = draw(names, length, seed)
    padding = 1 + int(at * 5)
    padded = torch.cat([torch.randn_like(qkv[:, :, :, :1]).expand(-1, -1, -1, padding, -1), qkv], 3)
    mask = torch.arange(length + padding).expand(2, -1) >= padding
    out = attend(padded, parts, backend, mask=mask)[:, :, padding:]
    assert_close(out, attend(qkv, parts, backend), rtol=1e-12, atol=1e-12)


@calls
def test_right_padding_changes_nothing_even_in_both_directions(names, backend, length, at, seed):
    qkv, parts = draw(names, length, seed)
    padding = 1 + int(at * 5)
    padded = torch.cat([qkv, torch.randn_like(qkv[:, :, :, :1]).expand(-1, -1, -1, padding, -1)], 3)
    mask = torch.arange(length + padding).expand(2, -1) < length
    out = attend(padded, parts, backend, mask=mask, causal=False)[:, :, :length]
    expected = attend(qkv, parts, backend, causal=False)
    assert_close(out, expected, rtol=1e-12, atol=1e-12)


def logits(adapter, bias, scores, offset=0):
    """Return the logits of a causal block of scores whose first row is query `offset`."""
    rows, keys = scores.shape[2:]
    query, key = torch.arange(rows) + offset, torch.arange(keys)
    visible = visibility(rows, keys, None, True, offset, scores.device)
    nothing = torch.zeros(1, HEADS, 1, 4, dtype=scores.dtype)
    where = Rows(
        nothing.expand(-1, -1, rows, -1), nothing.expand(-1, -1, keys, -1), query, key, visible, 1.0
    )
    return adapter(scores, bias(query, key), where)


@given(
    kernel_size=st.sampled_from([3, 5, 7]),
    inputs=st.sampled_from(["concat", "sum", "bias", "scores"]),
    length=st.integers(2, 17),
    at=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**31),
)
def test_no_logit_of_v2_depends_on_later_keys_nor_on_the_length(
    kernel_size, inputs, length, at, seed
):
    torch.manual_seed(seed)
    adapter = dape.DAPE(HEADS, 4, kernel_size, inputs=inputs).double()
    bias = dape.Kerple(HEADS).double()
    scores = torch.randn(1, HEADS, length, length, dtype=torch.float64)
    row = int(at * length)
    expected = logits(adapter, bias, scores)[:, :, row, : row + 1]
    changed = scores.clone()
    changed[..., row, row + 1 :] += 1
    after = logits(adapter, bias, changed)[:, :, row, : row + 1]
    assert torch.equal(after, expected)
    alone = logits(adapter, bias, scores[:, :, row : row + 1, : row + 1], offset=row)[:, :, 0]
    assert_close(alone, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_without_rows_every_key_counts_as_visible(kernel_size):
    adapter, bias = dape.DAPE(HEADS, 4, kernel_size).double(), dape.Kerple(HEADS).double()
    scores = torch.randn(1, HEADS, 1, 9, dtype=torch.float64)
    shift = bias(torch.tensor([8]), torch.arange(9))
    assert_close(adapter(scores, shift), logits(adapter, bias, scores, offset=8))
