"""Mounted adapters under every backend, in half precision, checkpointed and compiled."""

from importlib import import_module

import pytest
import torch
from pretrained import WINDOW, bias_for, move, padded, pretrained, tokens
from torch.testing import assert_close

import dape
from dape.model.retrofit import interface

chunked = import_module("dape.attention.chunked")


def grown(name, backend, dtype=torch.float32, **options):
    """Return a model whose adapters have learned the same whatever the backend."""
    model = pretrained(name, dtype)
    torch.manual_seed(3)
    move(dape.retrofit(model, bias=bias_for(name), backend=backend, **options).adapters, 0.3)
    return model


def loss_and_gradients(model, ids, mask):
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return [loss.detach(), *found]


@pytest.mark.unhooked
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "bloom", "dape-rope"])
def test_the_fused_kernels_serve_training_and_decoding_beside_padding(name):
    """They refuse a mask that differs between queries: padding reaches them as padding."""
    ids, mask = padded(length=14)
    fused, plain = grown(name, "triton"), grown(name, "reference")
    ours, theirs = (loss_and_gradients(model, ids, mask) for model in (fused, plain))
    for mine, exact in zip(ours, theirs, strict=True):
        assert_close(mine, exact, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        first = fused(ids[:, :12], attention_mask=mask[:, :12], use_cache=True)
        rest = fused(ids[:, 12:], attention_mask=mask, past_key_values=first.past_key_values)
        expected = plain(ids, attention_mask=mask, use_cache=False).logits
    found = torch.cat([first.logits, rest.logits], dim=1)
    assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.unhooked
def test_a_window_serves_the_fused_kernels_while_it_holds_every_key():
    fused, plain = (grown("mistral", backend) for backend in ("auto", "reference"))
    for module in fused.modules():
        if hasattr(module, "attention_backend"):
            module.attention_backend = "triton"
    ids = tokens(2, WINDOW - 1)
    with torch.no_grad():
        found, expected = (model(ids, use_cache=False).logits for model in (fused, plain))
        assert_close(found, expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(dape.UserError, match="the mask differs between queries"):
            fused(tokens(2, WINDOW), use_cache=False)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_chunked_is_the_textbook(name, monkeypatch):
    monkeypatch.setattr(chunked, "SCORES_PER_BLOCK", {"cpu": 200})
    ids, mask = padded()
    ours, theirs = (
        loss_and_gradients(grown(name, backend), ids, mask) for backend in ("chunked", "reference")
    )
    for mine, exact in zip(ours, theirs, strict=True):
        assert_close(mine, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "bloom", "gemma2"])
def test_bfloat16_is_near_float32(name):
    ids = tokens(2, 12)
    with torch.no_grad():
        exact = grown(name, "auto")(ids, use_cache=False).logits
        half = grown(name, "auto", torch.bfloat16)(ids, use_cache=False).logits
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()


def test_autocast_attends_in_half_precision_as_pytorchs_own(monkeypatch):
    seen, attention = [], interface.attention

    def spy(query, key, value, *args, **kwargs):
        seen.append({query.dtype, key.dtype, value.dtype})
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(interface, "attention", spy)
    model, ids = grown("llama", "auto"), tokens(2, 12)
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(ids, use_cache=False).logits
    assert seen[-4:] == [{torch.float32}] * 2 + [{torch.bfloat16}] * 2
    assert 0 < (half - exact).abs().max() < 0.05 * exact.abs().max()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # leaves float64 alone
        model.double()(ids, use_cache=False)
    assert seen[-2:] == [{torch.float64}] * 2


def test_attention_dropout_that_is_left_out_is_told_of(monkeypatch):
    told, model, ids = [], grown("gpt2", "auto"), tokens(2, 12)
    monkeypatch.setattr(interface.logger, "warning_once", told.append)
    model(ids, use_cache=False)
    assert told == []
    model.train()(ids, use_cache=False)
    assert set(told) == {"attention dropout 0.1 is not applied with adapters mounted"}


@pytest.mark.parametrize("name", ["gpt2", "llama", "mpt"])
def test_gradient_checkpointing_changes_no_gradient(name):
    model = grown(name, "chunked").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids, mask = padded()
    plain = loss_and_gradients(model, ids, mask)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for mine, exact in zip(loss_and_gradients(model, ids, mask), plain, strict=True):
        assert_close(mine, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.unhooked
@pytest.mark.parametrize("name", ["llama", "gpt2", "mpt"])
def test_a_mounted_model_compiles_to_one_graph(name):
    torch.compiler.reset()
    model, ids = grown(name, "chunked").requires_grad_(False), tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
