"""The language model: loss, start, outputs, positions, masks, checkpointing."""

import math

import numpy as np
import pytest
import torch
from models import SIZES, fresh, grown, tokens
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

from dape.errors import UserError
from dape.model import modeling
from dape.model.configuration import DapeConfig
from dape.model.masking import masking
from dape.model.modeling import DapeForCausalLM, DapeModel
from dape.positions.rotary import RoPE


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token():
    model, ids = grown(), tokens(2, 7)
    labels = ids.clone()
    labels[0, :4], labels[1, 6] = -100, -100
    out = model(ids, labels=labels)
    logits = out.logits.detach().numpy()
    losses = [
        np.log(np.exp(logits[b, t]).sum()) - logits[b, t, labels[b, t + 1]]
        for b in range(2)
        for t in range(6)
        if labels[b, t + 1] != -100
    ]
    assert len(losses) == 8
    # The loss is taken in float32, as everywhere in transformers.
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_loss_takes_shifted_labels_and_another_number_that_is_not_scored():
    model, ids = grown(), tokens(2, 7)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), 40)], 1)
    shifted[0, :4] = 40
    out = model(ids, labels=ids, shift_labels=shifted, ignore_index=40)
    logits, scored = out.logits.detach().numpy(), (shifted != 40).numpy()
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, np.where(scored, shifted, 0)[..., None], -1
    ).squeeze(-1)
    assert scored.sum() == 8
    assert out.loss.item() == pytest.approx(losses[scored].mean(), rel=1e-6)


@pytest.mark.parametrize("kind", [DapeForCausalLM, DapeModel])
@pytest.mark.parametrize("block", ["paper", "modern"])
def test_weights_start_with_the_documented_deviations(block, kind):
    width, depth = 128, 4
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 4 * width}
    model = kind(DapeConfig(**{**SIZES, **sizes, "vocab_size": 500}, block=block))
    small, wang = math.sqrt(2 / (5 * width)), 2 / (depth * math.sqrt(width))
    for name, parameter in model.named_parameters():
        if ".adapter." in name or ".position_bias." in name:
            continue
        if parameter.ndim == 2:
            expected = wang if "o_proj" in name or "down_proj" in name else small
            count = parameter.numel()
            # Five standard errors of a deviation and of a mean.
            assert parameter.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * count))
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(count), name
        else:
            expected = torch.ones if name.endswith("norm.weight") else torch.zeros
            assert torch.equal(parameter, expected(parameter.shape)), name


def test_one_seed_gives_the_same_weights_and_another_others():
    def weights(seed):
        torch.manual_seed(seed)
        return list(fresh(scheme="dape3-kerple").parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(3), weights(3), strict=True))
    changed = [not torch.equal(a, b) for a, b in zip(weights(3), weights(4), strict=True)]
    assert sum(changed) == sum(p.unique().numel() > 1 for p in weights(3))


def test_weights_built_on_no_device_can_be_drawn_later():
    """As sharded training does: on the meta device, then emptied onto a real one."""
    with torch.device("meta"):
        model = fresh(scheme="dape-kerple")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    bias = model.model.layers[0].self_attn.position_bias
    assert (bias.p > 0).all() and (bias.a > 0).all()


@pytest.mark.parametrize("scheme", ["dape3-kerple", "fire"])
def test_a_model_without_data_reads_a_mask(scheme):
    with torch.device("meta"):
        logits = fresh(scheme=scheme)(
            torch.zeros(2, 6).long(), attention_mask=torch.ones(2, 6)
        ).logits
    assert logits.is_meta and logits.shape == (2, 6, 37)


def test_tied_embeddings_are_one_tensor_before_and_after_a_file(tmp_path):
    model, ids = fresh(tie_word_embeddings=True), tokens(1, 5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = DapeForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert sum(p.numel() for p in fresh().parameters()) == (
        sum(p.numel() for p in model.parameters()) + SIZES["vocab_size"] * SIZES["hidden_size"]
    )


def test_embeddings_may_stand_for_ids():
    model, ids = grown(), tokens(2, 7)
    embedded = model(inputs_embeds=model.model.embed_tokens(ids))
    assert torch.equal(embedded.logits, model(ids).logits)
    with pytest.raises(UserError, match="either input_ids or inputs_embeds"):
        model()


def test_hidden_states_run_from_the_embeddings_to_the_last_norm():
    model, ids = grown(), tokens(2, 7)
    out = model(ids, output_hidden_states=True)
    states = out.hidden_states
    assert len(states) == SIZES["num_hidden_layers"] + 1
    assert torch.equal(states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(states[-1]), out.logits)
    assert_close(model.model.layers[0](states[0]), states[1])


@pytest.mark.parametrize("asked", ["by the call", "by the configuration"])
def test_attentions_are_the_causal_weights_the_outputs_are_made_of(asked):
    model, ids = grown(num_key_value_heads=4), tokens(2, 7)
    model.config.output_attentions = asked == "by the configuration"
    out = model(ids, **({"output_attentions": True} if asked == "by the call" else {}))
    assert len(out.attentions) == SIZES["num_hidden_layers"]
    for weights in out.attentions:
        assert weights.shape == (2, 4, 7, 7) and not weights.triu(1).any()
        assert_close(weights.sum(-1), torch.ones(2, 4, 7).double())
    layer = model.model.layers[0]
    normed = layer.input_layernorm(model.model.embed_tokens(ids))
    value = layer.self_attn.v_proj(normed).unflatten(-1, (4, -1)).transpose(1, 2)
    mixed = layer.self_attn.o_proj((out.attentions[0] @ value).transpose(1, 2).flatten(2))
    assert_close(mixed, layer.self_attn(normed)[0])
    model.config.output_attentions = False
    unasked = model(ids)
    assert unasked.attentions is None
    assert_close(unasked.logits, out.logits)


def test_the_last_logits_alone_equal_the_last_of_all():
    model, ids = grown(), tokens(2, 7)
    whole = model(ids).logits
    assert_close(model(ids, logits_to_keep=2).logits, whole[:, 5:])
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])
    with pytest.raises(UserError, match="leave logits_to_keep out"):
        model(ids, logits_to_keep=2, labels=ids)


@pytest.mark.parametrize("scheme", ["dape-kerple", "rope", "sinusoidal", "fire"])
@pytest.mark.parametrize("cache", [None, DynamicCache, StaticCache])
def test_explicit_positions_equal_implicit_ones(scheme, cache):
    model, ids = grown(scheme=scheme), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    if cache is None:
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    else:
        kept = cache(model.config, max_cache_len=12) if cache is StaticCache else cache()
        out = torch.cat(
            [
                model(
                    ids[:, piece], attention_mask=mask[:, : piece.stop], past_key_values=kept,
                    position_ids=positions[:, piece],
                ).logits
                for piece in (slice(0, 6), slice(6, 7), slice(7, 9))
            ],
            dim=1,
        )  # fmt: skip
    seen = mask.bool()
    assert_close(out[seen], expected[seen], rtol=1e-9, atol=1e-9)
    short = model(ids, attention_mask=mask, position_ids=positions.int(), use_cache=False).logits
    assert_close(short[seen], expected[seen], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", ["rope", "yarn", "dynamic-ntk", "xpos", "randomized-rope"])
@pytest.mark.parametrize("one_more", [False, True])
def test_layers_share_angles_and_turn_as_by_their_own(scheme, one_more, monkeypatch):
    model, ids = grown(scheme=scheme).eval(), tokens(2, 9)
    if one_more:
        model.model.layers[1].self_attn.rotation = RoPE(model.config.head_dim, base=100.0)
    shared = model(ids).logits
    monkeypatch.setattr(modeling, "angles_of", lambda *_: None)
    assert torch.equal(model(ids).logits, shared)


def test_angles_of_one_pass_are_computed_once(monkeypatch):
    model, ids, calls = grown(scheme="rope"), tokens(2, 9), []
    waves = RoPE.waves
    monkeypatch.setattr(RoPE, "waves", lambda *given: calls.append(1) or waves(*given))
    model(ids)
    assert len(model.model.layers) > 1 and len(calls) == 1


def test_angles_reach_layers_in_float32_where_fsdp_rounds_their_tensors():
    """FSDP maps a cast over the tensors among the arguments of a layer."""
    angles = RoPE(8).angles(torch.arange(3000), torch.bfloat16)
    (given,) = tree_leaves({"angles": angles})
    assert given is angles and angles.cos.dtype == torch.float32


@pytest.mark.parametrize("use_cache", [True, False])
def test_relative_schemes_do_not_see_where_counting_starts(use_cache):
    model, ids = grown(scheme="dape3-kerple"), tokens(2, 9)
    positions = torch.arange(9)[None] + torch.tensor([[5], [300]])
    out = model(ids, position_ids=positions, use_cache=use_cache).logits
    assert_close(out, model(ids).logits, rtol=1e-9, atol=1e-9)
    stretched = model(
        ids, position_ids=2 * positions, attention_mask=torch.ones(2, 9), use_cache=use_cache
    ).logits
    assert (stretched - out)[:, 1:].abs().amax(-1).min() > 1e-6


def test_a_mask_of_every_query_keeps_packed_documents_apart():
    model, ids = grown(scheme="dape-kerple"), tokens(1, 9)
    document = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    mask = (document[:, None] == document).tril()[None, None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    assert_close(packed, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", ["dape-kerple", "dape3-fire", "learned"])
def test_the_first_mask_may_have_the_length_of_a_static_cache(scheme):
    model, ids, mask = grown(scheme=scheme), tokens(2, 7), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask[:, :7], use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=12)
    found = [
        model(ids[:, piece], attention_mask=mask, past_key_values=cache).logits
        for piece in (slice(0, 5), slice(5, 6), slice(6, 7))
    ]
    shown = mask[:, :7].bool()
    assert_close(torch.cat(found, 1)[shown], expected[shown], rtol=1e-9, atol=1e-9)


def test_positions_have_a_batch_axis_only_where_padding_moves_them():
    """With a batch axis a bias is a table for each row, which the fused kernels do not serve."""
    states, mask = torch.zeros(2, 7, 1), torch.ones(2, 7)
    mask[0, :3] = 0
    for relative, given, moves in (
        (True, mask, False), (False, mask, True), (True, None, False), (False, None, False)
    ):  # fmt: skip
        found = masking(states, given, None, None, None, relative=relative)
        assert (found["key_positions"] is not None) is moves
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    found = masking(states, None, None, None, documents, relative=True)
    assert found["key_positions"] is None


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(2, 8), "must cover 0 cached and 7 new keys"),
        (torch.ones(2, 6), "must cover 0 cached and 7 new keys"),
        (torch.zeros(2, 1, 7, 7), "in place of an additive mask"),
        (torch.ones(2, 7, 7), r"attention_mask \[2, 7, 7\]"),
        (torch.ones(2, 1, 1, 7).bool(), "four axes must have a row for each of 7 queries"),
        (torch.ones(3, 7), r"attention_mask \[3, 7\] must be \[2, keys\]"),
        (torch.ones(2, 7).tril() * -1e9, "values other than 1 for visible and 0 for hidden"),
        (torch.arange(14).view(2, 7) // 4, "number documents by seq_idx"),
        (torch.full((2, 7), math.nan), "in place of an additive mask"),
        (2 * torch.ones(2, 1, 7, 7).long(), "values other than 1 for visible"),
    ],
    ids=["long", "short", "additive", "three axes", "of no query", "of three rows", "of two axes",
         "numbers", "no numbers", "twos"],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused(mask, words):
    with pytest.raises(UserError, match=words):
        fresh()(tokens(2, 7), attention_mask=mask)


def test_a_mask_must_cover_the_cached_keys_too():
    model, ids = fresh(), tokens(2, 7)
    cache = model(ids[:, :4]).past_key_values
    with pytest.raises(UserError, match="must cover 4 cached and 3 new keys"):
        model(ids[:, 4:], attention_mask=torch.ones(2, 3), past_key_values=cache)
    full = StaticCache(model.config, max_cache_len=4)
    model(ids[:, :4], past_key_values=full)
    with pytest.raises(UserError, match="1 new keys, and the static cache holds 4"):
        model(ids[:, 4:5], attention_mask=torch.ones(2, 5), past_key_values=full)


@pytest.mark.parametrize("block", ["paper", "modern"])
@pytest.mark.parametrize("scheme", ["dape-kerple", "dape3-nope"])
def test_checkpointing_layers_changes_no_gradient(scheme, block):
    model, ids = grown(scheme=scheme, block=block).train(), tokens(2, 9)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable()
    assert model.model.layers[0].gradient_checkpointing
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_layers_that_are_computed_twice_keep_no_cache():
    model, ids = grown().train(), tokens(2, 9)
    model.gradient_checkpointing_enable()
    assert model(ids).past_key_values is None
    with pytest.raises(UserError, match="gradient checkpointing computes each layer twice, and a"):
        model(ids, past_key_values=DynamicCache())


@pytest.mark.unhooked
def test_reading_both_ways_takes_no_cache():
    model, ids = DapeModel(DapeConfig(**SIZES, causal=False)), tokens(1, 7)
    cache = model(ids).past_key_values
    with pytest.raises(UserError, match=r"^causal=False: .* leave past_key_values out$"):
        model(ids, past_key_values=cache)


def test_an_argument_may_say_which_way_the_model_reads():
    model, ids = DapeModel(DapeConfig(**SIZES, causal=False)).eval(), tokens(1, 7)
    expected = model(ids, use_cache=False).last_hidden_state
    assert torch.equal(model(ids, use_cache=False, is_causal=False).last_hidden_state, expected)
    with pytest.raises(UserError, match="unknown argument of the model 'is_causal'"):
        model(ids, use_cache=False, is_causal=True)


@pytest.mark.unhooked  # the hook refuses them before
def test_tuples_of_tensors_are_no_cache():
    with pytest.raises(UserError, match="is a tuple; give a Cache of transformers, such as Dyn"):
        fresh()(tokens(1, 4), past_key_values=((torch.zeros(1), torch.zeros(1)),))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_taken_and_returned_by_the_name_of_any_release(name):
    model, ids, kept = grown(), tokens(2, 7), DynamicCache()
    first = model(ids[:, :4], **{name: kept})
    assert first.past_key_values is kept and kept.get_seq_length() == 4
    assert first.to_tuple()[1] is kept
    rest = model(ids[:, 4:], **{name: kept}).logits
    assert_close(rest, model(ids).logits[:, 4:], rtol=1e-9, atol=1e-9)
    both = {"past_key_values": (twice := DynamicCache()), "cache": twice}
    assert_close(model(ids, **both).logits, model(ids).logits, rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match="past_key_values and cache are two names of one argument"):
        model(ids, **{"past_key_values": DynamicCache(), "cache": DynamicCache(), name: kept})


def test_backends_agree_in_the_model():
    model, ids = grown(scheme="dape3-kerple"), tokens(2, 9)
    logits = []
    for backend in ("reference", "chunked", "auto"):
        model.config.backend = backend
        logits.append(model(ids).logits)
    assert_close(logits[1], logits[0], rtol=1e-12, atol=1e-12)
    assert_close(logits[2], logits[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cast", ["to", "from_pretrained"])
def test_a_bfloat16_model_tells_position_256_from_257(cast, tmp_path):
    model = fresh(scheme="dape-kerple")
    if cast == "to":
        small = model.to(torch.bfloat16)
    else:
        model.save_pretrained(tmp_path)
        small = DapeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    bias = small.model.layers[1].self_attn.position_bias
    query, key = torch.tensor([4000]), 4000 - torch.tensor([256, 257])
    near, far = bias(query, key)[:, 0].unbind(-1)
    assert (far < near).all()
    distance = torch.tensor([256.0, 257.0])
    expected = -bias.p[:, None] * torch.log1p(bias.a[:, None] * distance)
    assert_close(torch.stack([near, far], -1), expected, rtol=1e-6, atol=0)


def test_autocast_leaves_biases_and_logits_in_float32():
    model, ids = fresh(scheme="dape-kerple"), tokens(1, 9)
    seen = []
    for layer in model.model.layers:
        for part in (layer.self_attn.position_bias, layer.self_attn.adapter):
            part.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    plain = model(ids)
    without, seen[:] = list(seen), []
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert len(seen) == len(without) == 2 * SIZES["num_hidden_layers"]
    assert all(out.dtype == torch.float32 for _, out in seen)
    assert torch.equal(seen[0][1], without[0][1])
    # The adapter's own products are float32 too: with its inputs of autocast, its logits again.
    (scores, bias, *_), logits = seen[1]
    adapter = model.model.layers[0].self_attn.adapter
    assert torch.equal(adapter(scores, bias), logits)
    assert plain.logits.dtype == torch.float32
