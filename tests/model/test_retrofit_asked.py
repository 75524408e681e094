"""What a call asks of all attentions of a retrofitted model: documents apart, and the weights."""

import itertools

import pytest
import torch
from pretrained import NAMES, SIZES, bias_for, move, pretrained, tokens
from torch.testing import assert_close
from transformers import (
    BartConfig,
    BartForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    RobertaConfig,
    RobertaForCausalLM,
    StaticCache,
)

import dape
from dape.errors import UserError
from dape.model.retrofit import interface
from dape.model.retrofit.asked import offset_of

LENGTHS = (4, 1, 7)
FORMS = {
    "position_ids": {"return_position_ids": True},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "all": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}


def grown(name, adapter="dape", bias=None):
    """Return a float64 model whose adapters have learned something."""
    model = pretrained(name, torch.float64)
    mounted = dape.retrofit(model, adapter, bias or bias_for(name))
    move(mounted.adapters.double(), 0.3)
    return model


def packed(form, texts=None):
    """Return three documents, and their batch of one row as transformers' collator packs it."""
    texts = texts or [tokens(length) for length in LENGTHS]
    return texts, DataCollatorWithFlattening(**FORMS[form])([{"input_ids": ids} for ids in texts])


def alone(model, texts):
    return torch.cat([model(ids[None], use_cache=False).logits[0] for ids in texts])


def near(ours, theirs):
    assert_close(ours, theirs, rtol=0, atol=1e-5)  # angles of transformers are float32


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_document_has_the_logits_it_has_alone(name):
    model, texts = grown(name), [tokens(length) for length in LENGTHS]
    expected = alone(model, texts)
    for form in FORMS:
        _, batch = packed(form, texts)
        near(model(**batch).logits[0], expected)
        near(model(**batch, use_cache=False).logits[0], expected)


@torch.no_grad()
def test_a_family_counts_the_positions_of_a_document_behind_the_number_of_padding():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = RobertaConfig(vocab_size=32, intermediate_size=24, is_decoder=True, **sizes)
    model = move(RobertaForCausalLM(config).eval().double(), 0.1)
    move(dape.retrofit(model, "dape", "kerple").adapters.double(), 0.3)
    texts = [torch.randint(3, 32, (length,)) for length in LENGTHS]
    batch = DataCollatorWithFlattening(**FORMS["seq_idx"])([{"input_ids": ids} for ids in texts])
    near(model(**batch).logits[0], alone(model, texts))


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_are_refused_by_a_model_that_takes_no_positions(form):
    sizes = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 20}
    model = BartForCausalLM(BartConfig(**SIZES, **sizes))
    dape.retrofit(model)
    with pytest.raises(UserError, match=r"BartForCausalLM takes no position_ids, .* a row of"):
        model(**packed(form)[1])


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bloom"])
@torch.no_grad()
def test_documents_are_apart_behind_caches_and_for_a_bias_of_absolute_positions(name):
    model, (texts, batch) = grown(name), packed("seq_idx")
    expected = alone(model, texts)
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=16)):
        near(model(**batch, past_key_values=cache).logits[0], expected)
    with pytest.raises(UserError, match="do not cover 12 cached keys") as error:
        model(**batch, past_key_values=cache)
    assert "\n" not in str(error.value)
    if bias_for(name):
        model = grown(name, "dape3", "fire")
        near(model(**batch).logits[0], alone(model, texts))


@pytest.mark.parametrize("reentrant", [True, False])
def test_loss_and_gradients_are_those_of_the_documents_alone(reentrant):
    model, (texts, batch) = grown("llama"), packed("all")
    adapters = [p for p in model.parameters() if p.requires_grad]
    count = torch.tensor(sum(LENGTHS) - len(LENGTHS))
    losses = [
        model(ids[None], labels=ids[None], num_items_in_batch=count).loss
        for ids in texts
        if len(ids) > 1
    ]
    expected = torch.autograd.grad(sum(losses), adapters)
    model.train().enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    first, second = (model(**batch).loss for _ in range(2))
    model(texts[0][None])  # the layers of the second pass are computed again after this one
    second.backward()
    assert_close(second, sum(losses), rtol=1e-6, atol=1e-6)
    assert torch.equal(first, second)
    for parameter, gradient in zip(adapters, expected, strict=True):
        assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.unhooked
@torch.no_grad()
def test_a_compiled_model_keeps_documents_apart():
    torch._dynamo.reset()
    model, (texts, batch) = grown("llama"), packed("seq_idx")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    near(compiled(**batch).logits[0], alone(model, texts))


@pytest.mark.unhooked
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_compiled_training_of_single_documents_makes_no_mask_of_documents(name, monkeypatch):
    """transformers makes one, `[B, 1, T, T]`, which the fused kernels do not serve."""
    torch._dynamo.reset()
    model, ids, masks = grown(name, "dape", "fire").train(), tokens(2, 4), []
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1  # not applied
    attend = interface.attention

    def watched(*args, mask=None, **kwargs):
        masks.append(None if mask is None else mask.ndim)
        return attend(*args, mask=mask, **kwargs)

    monkeypatch.setattr(interface, "attention", watched)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad(f(ids, labels=ids, use_cache=False).loss, parameters)
        for f in (compiled, model)
    )
    for mine, true in zip(ours, theirs, strict=True):
        assert_close(mine, true, rtol=1e-9, atol=1e-12)
    assert masks == [2, 2, None, None]


def replica(module):
    """Return a copy as `DataParallel` makes one for a device."""
    copied = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(copied, name, None if parameter is None else parameter.view_as(parameter))
    for name, child in module.named_children():
        copied._modules[name] = replica(child)
    return copied


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_copies_of_data_parallelism_keep_documents_apart(name):
    model, (texts, batch) = grown(name), packed("seq_idx")
    batch = {name: batch[name] for name in ("input_ids", "seq_idx")}
    near(replica(model)(**batch).logits[0], alone(model, texts))


@torch.no_grad()
def test_documents_are_those_of_the_present_call():
    model, (_, batch) = grown("llama"), packed("seq_idx")
    ids = batch["input_ids"]
    expected = model(ids).logits
    assert (model(**batch).logits - expected).abs().max() > 0.1
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(IndexError):
        model(input_ids=ids * 1000, seq_idx=batch["seq_idx"])
    assert torch.equal(model.model(ids)[0], model(ids, output_hidden_states=True).hidden_states[-1])


@torch.no_grad()
def test_a_trainer_may_call_a_method_in_place_of_the_forward():
    """As TRL and Lightning do, so that hooks around the forward are around the method."""
    model, ids = grown("llama"), tokens(2, 6)
    expected = model(ids).logits
    model.forward = lambda other, inputs: other.lm_head(other.model(**inputs).last_hidden_state)
    assert torch.equal(model(model, {"input_ids": ids}), expected)


@torch.no_grad()
def test_a_mask_of_ones_or_cached_keys_say_that_a_row_is_one_document():
    """As in transformers, whose `generate` gives such positions."""
    model, ids = grown("llama"), tokens(2, 6)
    positions = torch.tensor([[0, 2, 4, 7, 8, 9]])
    whole = model(ids, torch.ones(2, 6), positions).logits
    assert torch.equal(
        whole, model(ids, position_ids=positions, attention_mask=torch.ones(2, 6)).logits
    )
    cached = model(ids, position_ids=positions, past_key_values=DynamicCache()).logits
    assert_close(cached, whole, rtol=1e-9, atol=1e-9)
    assert (whole - model(ids, position_ids=positions).logits).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon"])
@torch.no_grad()
def test_no_call_of_a_model_or_a_part_reads_the_documents_of_the_call_before(name):
    model, (texts, batch) = grown(name), packed("seq_idx")
    ids = batch["input_ids"]
    expected = {False: model(ids, use_cache=False).logits[0], True: alone(model, texts)}
    calls = list(itertools.product((False, True), repeat=2))
    for part, apart in itertools.chain(*itertools.product(calls, repeat=2)):
        given = {"seq_idx": batch["seq_idx"]} if apart else {}
        found = (
            model.lm_head(model.base_model(ids, **given)[0]) if part else model(ids, **given).logits
        )
        near(found[0], expected[apart])


@torch.no_grad()
def test_a_part_that_is_a_model_keeps_documents_apart_and_a_layer_says_that_it_cannot():
    model, (texts, batch) = grown("llama"), packed("seq_idx")
    found = model.model(batch["input_ids"], seq_idx=batch["seq_idx"])[0]
    near(found, torch.cat([model.model(ids[None])[0] for ids in texts], 1))
    layer, waves = model.model.layers[0], model.model.rotary_emb
    where = torch.arange(found.shape[1])[None]
    with pytest.raises(UserError, match="not of a layer") as error:
        layer(found, position_embeddings=waves(found, where), seq_idx=batch["seq_idx"])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not of a layer"):
        bounds = torch.tensor([0, 5, found.shape[1]])
        layer(found, position_embeddings=waves(found, where), cu_seq_lens_q=bounds)


@pytest.mark.parametrize("by", ["argument", "generate"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "mpt", "falcon", "gemma2"])
@torch.no_grad()
def test_every_model_returns_the_weights_of_its_attentions(name, by):
    model, ids = pretrained(name), tokens(2, 7)
    model.config._attn_implementation = "eager"
    own = model(ids, output_attentions=True, use_cache=False).attentions
    dape.retrofit(model)
    if by == "argument":
        found = model(ids, output_attentions=True).attentions
    else:
        options = {"max_new_tokens": 1, "output_attentions": True, "return_dict_in_generate": True}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options).attentions[0]
    assert len(found) == 2
    for ours, theirs in zip(found, own, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert not model(ids).attentions


@pytest.mark.parametrize(("written", "offset"), [(0, 0), (5, 5), (6, 6), (7, 6), (40, 6)])
def test_queries_stand_behind_the_written_keys_and_last_once_a_window_drops_keys(written, offset):
    assert offset_of(written, 2, 8) == offset
    assert offset_of(torch.tensor(written), 2, 8).item() == offset
    assert offset_of(None, 2, 8) == 6


@pytest.mark.parametrize("form", ["ones", "padding", "four axes"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_documents_named_beside_a_mask_are_apart_and_count_their_own_visible_tokens(name, form):
    """Models with learned positions count hidden tokens too, unless told otherwise."""
    model, (texts, batch) = grown(name), packed("seq_idx")
    given = {key: batch[key] for key in ("input_ids", "seq_idx")}
    mask, hidden = torch.ones(1, 12, dtype=torch.long), form == "padding"
    if hidden:
        mask[0, [0, 5, 6]] = 0
        texts = [texts[0][1:], texts[1], texts[2][2:]]
    if form == "four axes":
        mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    found = model(**given, attention_mask=mask, use_cache=False).logits[0]
    near(found[mask[0].bool()] if hidden else found, alone(model, texts))


@torch.no_grad()
def test_masks_of_every_kind_of_layer_are_compared_with_the_positions():
    model, ids = grown("gemma3"), tokens(2, 6)
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    masks = {"full_attention": causal, "sliding_attention": causal.triu(-4)}
    found = model(ids, attention_mask=masks, position_ids=torch.arange(6)[None] + 3).logits
    near(found, model(ids).logits)
    apart = torch.tensor([[0, 3, 4, 8, 9, 13]])
    with pytest.raises(UserError, match="position_ids beside an attention_mask of four axes"):
        model(ids, attention_mask=masks, position_ids=apart)
    # Of several rows it is enough that one lies apart.
    rows = torch.cat([torch.arange(6)[None], apart])
    with pytest.raises(UserError, match="position_ids beside an attention_mask of four axes"):
        model(ids, attention_mask=causal.expand(2, 1, 6, 6), position_ids=rows)


@torch.no_grad()
def test_a_single_query_behind_a_mask_of_four_axes_has_no_known_position():
    """Padding before the keys moves the query, which FIRE reads."""
    model, ids = grown("llama", bias="fire"), tokens(1, 6)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    mask[..., :2] = False
    with pytest.raises(UserError, match="FIRE depends on more than the distance"):
        model(ids[:, 5:], attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_alibi_of_a_model_reads_no_positions():
    model, ids = pretrained("falcon-alibi"), tokens(2, 6)
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(6)[None] * 3}
    expected = model(ids, use_cache=False, **given).logits
    near(expected, model(ids, use_cache=False).logits)
    dape.retrofit(model)
    near(model(ids, use_cache=False, **given).logits, expected)
