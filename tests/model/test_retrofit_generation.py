"""Mounted adapters through caches, padding, windows and whole masks: always the same logits."""

import functools
import itertools

import pytest
import torch
from pretrained import GROUPED, NAMES, WINDOW, WINDOWS, bias_for, move, padded, pretrained, tokens
from torch.testing import assert_close
from transformers import DynamicCache, Gemma4ForCausalLM, Gemma4TextConfig, StaticCache

import dape
from dape.errors import UserError
from dape.model.retrofit.interface import LayerMask, attend

every_model = pytest.mark.parametrize("name", NAMES)
CACHES = [{"cache_implementation": "dynamic"}, {"cache_implementation": "static"}]


def grown(name, adapter="dape", bias=None, dtype=torch.float64, **options):
    """Return a model whose adapters have learned something, and that decides clearly."""
    model = pretrained(name, dtype)
    handle = dape.retrofit(model, adapter, bias or bias_for(name), **options)
    move(handle.adapters.to(dtype), 0.3)
    return model.requires_grad_(False)


@functools.cache
def shared(name, dtype=torch.float64):
    """Return a model that several tests hold, and none changes."""
    with torch.random.fork_rng(devices=()):  # a test draws the same whatever is built already
        torch.default_generator.manual_seed(0)
        return grown(name, dtype=dtype)


def generate(model, ids, mask=None, sample=False, **options):
    """Return six tokens and their logits. Sampled, for greedily these models repeat one."""
    torch.manual_seed(1)
    mask = torch.ones_like(ids) if mask is None else mask
    chance = {"temperature": 2.0, "top_k": None} if sample else {}
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, suppress_tokens=[0],
        do_sample=sample, output_logits=True, return_dict_in_generate=True, **chance, **options,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def cached(model, ids, mask, ends):
    """Return the logits of pieces that go through a cache, with the positions `generate` gives."""
    cache, positions = DynamicCache(config=model.config), (mask.cumsum(-1) - 1).clamp(min=0)
    pieces = [
        model(
            ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b],
            past_key_values=cache,
        ).logits
        for a, b in itertools.pairwise(ends)
    ]  # fmt: skip
    return torch.cat(pieces, dim=1)


@every_model
def test_no_logit_depends_on_later_tokens(name):
    model, ids = shared(name), tokens(1, 12)
    changed = ids.clone()
    changed[:, 7:] = ids[:, 7:] % 59 + 1
    whole, other = (model(x, use_cache=False).logits for x in (ids, changed))
    assert torch.equal(whole[:, :7], other[:, :7])
    assert (whole[:, 7:] != other[:, 7:]).any(-1).all()


@every_model
def test_pieces_through_a_cache_equal_one_pass(name):
    model, ids = shared(name), tokens(2, 12)
    expected = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=16)):
        seen, pieces = 0, []
        for piece in ids.split([4, 1, 3, 1, 1, 2], 1):
            seen += piece.shape[1]
            mask = torch.ones(2, seen, dtype=torch.long)
            pieces.append(model(piece, attention_mask=mask, past_key_values=cache).logits)
        assert_close(torch.cat(pieces, 1), expected, rtol=1e-9, atol=1e-9)


@every_model
def test_generation_through_a_cache_equals_generation_without(name):
    model, ids = shared(name), tokens(2, 6)
    expected, logits = generate(model, ids, sample=True, use_cache=False)
    assert expected.unique().numel() > 6
    for cache in CACHES:
        found, ours = generate(model, ids, sample=True, **cache)
        assert torch.equal(found, expected), cache
        assert_close(ours, logits, rtol=1e-6, atol=1e-6)  # transformers keeps them in float32


@every_model
def test_a_left_padded_batch_continues_as_each_of_its_rows_alone(name):
    model = shared(name, torch.float32)
    ids, mask = padded(length=8)
    rows = [
        generate(model, ids[row : row + 1, padding:], **cache)
        for row, padding, cache in ((0, 4, CACHES[0]), (1, 0, CACHES[1]))
    ]
    alone, expected = map(torch.cat, zip(*rows, strict=True))
    for cache in CACHES:
        batch, logits = generate(model, ids, mask, **cache)
        assert torch.equal(batch, alone), cache
        assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("adapter", ["dape3", "talking-heads", "cope", "transformer-xl"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_adapter_goes_through_caches_windows_and_padding(name, adapter):
    options = {"options": {"adapter": {"residual": False}}} if adapter == "dape3" else {}
    model = pretrained(name)
    ids, mask = padded()
    own = model(ids, attention_mask=mask, use_cache=False).logits
    handle = dape.retrofit(model, adapter, "kerple" if adapter == "dape3" else None, **options)
    seen = mask.bool()
    started = model(ids, attention_mask=mask, use_cache=False).logits
    assert_close(started[seen], own[seen], rtol=0, atol=1e-5)
    move(handle.adapters, 0.3)
    expected = model.double()(ids[:1, 4:], use_cache=False).logits
    assert (expected - own[:1, 4:]).abs().max() > 0.01
    found = cached(model, ids, mask, (0, 9, 10, 11, 12))
    assert_close(found[:1, 4:], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_bias_of_absolute_positions_counts_tokens_and_what_a_window_dropped(name):
    # A low threshold, so that B depends on every position.
    model = grown(name, bias="fire", options={"bias": {"threshold": 2.0}})
    ids, mask = padded(length=14)
    expected = model(ids[:1, 4:], use_cache=False).logits
    found = cached(model, ids, mask, (0, 7, 12, 13, 14))
    assert_close(found[:1, 4:], expected, rtol=1e-9, atol=1e-9)


def test_packed_sequences_are_as_each_alone():
    model, (first, second) = grown("llama"), (tokens(1, 5), tokens(1, 7))
    where = torch.cat([torch.arange(5), torch.arange(7)])[None]
    both = model(torch.cat([first, second], 1), position_ids=where, use_cache=False).logits
    alone = [model(ids, use_cache=False).logits for ids in (first, second)]
    assert_close(both, torch.cat(alone, 1), rtol=1e-9, atol=1e-9)


def test_a_mask_of_four_axes_is_boolean():
    model, ids = grown("llama"), tokens(2, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    found = model(ids, attention_mask=causal.expand(2, 1, 6, 6), use_cache=False).logits
    assert_close(found, model(ids, use_cache=False).logits, rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match=r"of torch.float64: .* must be torch.bool"):
        model(ids, attention_mask=causal.double(), use_cache=False)
    with pytest.raises(UserError, match="FIRE depends on more than the distance"):
        grown("llama", bias="fire")(ids, attention_mask=causal, use_cache=False)
    with pytest.raises(UserError, match="is_causal=False: with adapters mounted"):
        model(ids, is_causal=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_mask_of_four_axes_counts_the_keys_written_in_a_static_cache(name):
    """Positions count from the first key, and not back from the end of the cache."""
    model, ids = grown(name), tokens(2, 5)
    expected = model(ids, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=16)
    length = WINDOW if name == "mistral" else 16
    causal = torch.ones(1, 1, 5, length, dtype=torch.bool).tril()
    pieces = [
        model(ids[:, a:b], attention_mask=causal[:, :, a:b], past_key_values=cache).logits
        for a, b in ((0, 3), (3, 4), (4, 5))
    ]
    assert_close(torch.cat(pieces, 1), expected, rtol=1e-9, atol=1e-9)
    cache.reset()
    again = {"past_key_values": cache, "position_ids": torch.arange(5)[None]}
    found = model(ids, attention_mask=causal, **again).logits
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Miscounting(DynamicCache):
    """A cache that counts the new keys alone for a mask, as that of MiniMax does."""

    def get_mask_sizes(self, query_length, *_):
        return query_length, 0


def test_a_cache_that_counts_other_keys_than_it_holds_is_refused():
    model, ids = grown("llama"), tokens(1, 6)
    cache = Miscounting(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    with pytest.raises(UserError, match="holds 6 keys, and transformers counts 1 for"):
        model(ids[:, 5:], past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mpt", "falcon", "gemma2"])
def test_attentions_are_the_models_own_at_the_start(name):
    model, ids = pretrained(name), tokens(2, 7)
    model.config._attn_implementation = "eager"
    own = model(ids, output_attentions=True, use_cache=False)
    dape.retrofit(model, backend="reference")
    ours = model(ids, output_attentions=True, use_cache=False)
    assert len(ours.attentions) == 2
    for mine, theirs in zip(ours.attentions, own.attentions, strict=True):
        assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert_close(ours.logits, own.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep", [1, 3])
def test_layers_that_share_keys_are_computed_for_the_last_queries_alone(keep):
    """As Gemma 4 does from transformers 5.24 on, which cuts the rows of masks."""
    layers = {"num_hidden_layers": 4, "layer_types": WINDOWS["layer_types"] * 2}
    inputs = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 4}
    config = Gemma4TextConfig(
        **{**GROUPED, **WINDOWS, **layers, **inputs},
        head_dim=8, global_head_dim=8, num_kv_shared_layers=2,
    )  # fmt: skip
    model = move(Gemma4ForCausalLM(config).eval(), 0.1)
    move(dape.retrofit(model, bias="kerple").adapters, 0.3)
    ids, mask = padded()
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    for cache in ({"use_cache": False}, {"past_key_values": StaticCache(config, max_cache_len=16)}):
        last = model(ids, attention_mask=mask, logits_to_keep=keep, **cache).logits
        assert_close(last, whole[:, -keep:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["none", "padding", "four axes"])
@pytest.mark.parametrize("rows", [slice(-3, None), slice(2, 5)])
@torch.no_grad()
def test_the_mask_of_a_layer_is_cut_to_some_of_its_queries(rows, form):
    layer = torch.nn.Module()
    layer.adapter, layer.position_bias = dape.DAPE(4, 5).double(), dape.Kerple(4).double()
    query, key, value = (torch.randn(2, h, 7, 6, dtype=torch.float64) for h in (4, 2, 2))
    mask = {
        "none": None,
        "padding": torch.arange(7) >= torch.tensor([[0], [2]]),
        "four axes": torch.ones(2, 1, 7, 7, dtype=torch.bool).tril().triu(-2),
    }[form]
    whole = LayerMask(mask, form != "four axes", 0, rows=7, keys=7)
    expected, _ = attend(layer, query, key, value, whole)
    found, _ = attend(layer, query[:, :, rows], key, value, whole[:, :, rows, :])
    assert_close(found, expected[:, rows], rtol=1e-12, atol=1e-12)
