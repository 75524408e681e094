"""Every bias and adapter within `dape.attention`: blocks, caches, padding, compilation."""

import copy

import pytest
import torch
from torch.testing import assert_close

import dape
from dape.attention import chunked

HEADS, HEAD_DIM = 4, 6
PARTS = {
    "kerple-power": lambda: (dape.KerplePower(HEADS), None),
    "t5": lambda: (dape.T5(HEADS), None),
    "sandwich": lambda: (dape.Sandwich(HEADS), None),
    "fire": lambda: (dape.FIRE(HEADS, train_length=5), None),
    "dape-fire": lambda: (dape.FIRE(HEADS, train_length=5), dape.DAPE(HEADS, 8)),
    "talking-heads": lambda: (dape.Kerple(HEADS), dape.TalkingHeads(HEADS)),
    "cope": lambda: (None, dape.CoPE(HEAD_DIM, npos_max=5)),
    "cope after a bias": lambda: (dape.ALiBi(HEADS), dape.CoPE(HEAD_DIM)),
    "transformer-xl": lambda: (None, dape.TransformerXL(HEADS, HEAD_DIM, 24)),
}


def build(name):
    """The parts in float64; what starts at zero is drawn, so that it counts."""
    parts = [part and part.double() for part in PARTS[name]()]
    for part in filter(None, parts):
        for parameter in part.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter)
    return parts


def draw(rows=11, keys=11, batch=2):
    query = torch.randn(batch, HEADS, rows, HEAD_DIM, dtype=torch.float64)
    key, value = torch.randn(2, batch, 2, keys, HEAD_DIM, dtype=torch.float64)
    return query, key, value


everyone = pytest.mark.parametrize("name", PARTS)


@everyone
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_rows_equal_the_whole_with_gradients(name, causal, monkeypatch):
    monkeypatch.setitem(chunked.SCORES_PER_BLOCK, "cpu", 2 * HEADS * 11 * 3)
    qkv, mask = draw(), torch.arange(11) >= torch.tensor([[0], [4]])
    results = []
    for backend in ("reference", "chunked"):
        bias, adapter = copy.deepcopy(results[0][0]) if results else build(name)
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = dape.attention(
            *leaves, bias, adapter, causal=causal, mask=mask, backend=backend,
            query_positions=torch.arange(11), key_positions=torch.arange(11),
        )  # fmt: skip
        parameters = [p for part in (bias, adapter) if part for p in part.parameters()]
        gradients = torch.autograd.grad((out * out.detach().cos()).sum(), [*leaves, *parameters])
        results.append(((bias, adapter), out, *gradients))
    for ours, theirs in zip(results[1][1:], results[0][1:], strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert all(gradient.any() for gradient in results[0][2:])


@everyone
def test_a_cache_padding_and_later_keys_change_no_row(name):
    bias, adapter = build(name)
    query, key, value = draw()
    whole = dape.attention(query, key, value, bias, adapter)

    step = dape.attention(
        query[:, :, 7:9], key[:, :, :9], value[:, :, :9], bias, adapter, query_offset=7
    )
    assert_close(step, whole[:, :, 7:9], rtol=1e-11, atol=1e-12)

    later = torch.randn(2, 2, 2, 4, HEAD_DIM, dtype=torch.float64)
    longer = dape.attention(
        torch.cat((query, query[:, :, :4]), 2), torch.cat((key, later[0]), 2),
        torch.cat((value, later[1]), 2), bias, adapter,
    )  # fmt: skip
    assert_close(longer[:, :, :11], whole, rtol=1e-11, atol=1e-12)

    pads = 3
    padded = [torch.cat((torch.randn_like(x[:, :, :pads]), x), dim=2) for x in (query, key, value)]
    positions = (torch.arange(11 + pads) - pads).clamp(min=0)
    shifted = dape.attention(
        *padded, bias, adapter, mask=torch.arange(11 + pads).expand(2, -1) >= pads,
        query_positions=positions.expand(2, -1), key_positions=positions.expand(2, -1),
    )  # fmt: skip
    assert_close(shifted[:, :, pads:], whole, rtol=1e-11, atol=1e-12)


@everyone
def test_repeated_keys_and_values_equal_grouped_ones(name):
    bias, adapter = build(name)
    query, key, value = draw()
    grouped = dape.attention(query, key, value, bias, adapter, causal=False)
    repeated = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    assert_close(
        dape.attention(query, *repeated, bias, adapter, causal=False), grouped,
        rtol=1e-11, atol=1e-12,
    )  # fmt: skip


@everyone
def test_bfloat16_inputs_are_scored_in_float32(name):
    parts = build(name)
    inputs = [x.bfloat16() for x in draw()]
    exact = dape.attention(*(x.double() for x in inputs), *parts)
    parts = [part and part.float() for part in parts]
    ours = dape.attention(*inputs, *parts)
    assert ours.dtype == torch.bfloat16
    assert_close(ours.double(), exact, rtol=2e-2, atol=2e-2)


@everyone
def test_parameters_are_drawn_anew_from_uninitialised_memory(name):
    torch.manual_seed(1)
    expected = PARTS[name]()
    with torch.device("meta"):
        parts = PARTS[name]()
    torch.manual_seed(1)
    for part, drawn in zip(parts, expected, strict=True):
        if part is None:
            continue
        part.to_empty(device="cpu")
        for parameter in part.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
        for ours, theirs in zip(part.parameters(), drawn.parameters(), strict=True):
            assert torch.equal(ours, theirs) and ours.ndim > 0


@pytest.mark.unhooked
@everyone
def test_forward_and_backward_compile_to_one_graph(name):
    torch.compiler.reset()
    parts, leaves = build(name), [x.requires_grad_() for x in draw(rows=5, keys=5, batch=1)]
    parameters = [p for part in parts if part for p in part.parameters()]

    def run(attention):
        out = attention(*leaves, *parts)
        return out, *torch.autograd.grad(out.square().sum(), [*leaves, *parameters])

    compiled = run(torch.compile(dape.attention, fullgraph=True, backend="aot_eager"))
    for ours, theirs in zip(compiled, run(dape.attention), strict=True):
        assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
