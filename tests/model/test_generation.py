"""Generation: the same tokens with every cache, padded or not, greedy or by beams."""

import copy

import pytest
import torch
from models import grown, tokens
from pretrained import pretrained
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache, MistralConfig, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

import dape
from dape.errors import UserError

OPTIONS = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
CACHES = {
    "none": {"use_cache": False},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
}


@pytest.fixture(params=["dape-kerple", "dape3-nope", "fire"])
def model(request):
    model = grown(scheme=request.param, train_length=8).requires_grad_(False)
    model.generation_config.eos_token_id = None
    # Outputs by far the likeliest, so that rounding cannot decide, and never the padding.
    model.lm_head.weight.mul_(5)
    return model


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, suppress_tokens=[0], **OPTIONS, **options)
    return out[:, ids.shape[1] :]


def test_greedy_tokens_are_those_of_repeated_whole_passes_in_every_cache(model):
    ids = tokens(2, 5)
    expected = ids
    for _ in range(OPTIONS["max_new_tokens"]):
        logits = model(expected, use_cache=False).logits[:, -1, 1:]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True) + 1], dim=1)
    assert expected[:, 5:].unique().numel() > 3
    for options in CACHES.values():
        assert torch.equal(generate(model, ids, **options), expected[:, 5:])


@pytest.mark.parametrize("cache", CACHES)
def test_a_left_padded_batch_continues_as_each_of_its_rows_alone(model, cache):
    ids = tokens(3, 7)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 5)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    batch = generate(model, ids, mask, **CACHES[cache])
    for row, padding in enumerate((0, 2, 5)):
        alone = generate(model, ids[row : row + 1, padding:], **CACHES[cache])
        assert torch.equal(batch[row : row + 1], alone)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("cache", CACHES)
def test_positions_that_the_caller_gives_are_honoured(model, cache, beams):
    """As in whole passes at these positions, which go on by one."""
    ids = tokens(2, 5)
    positions = torch.tensor([[0, 3, 4, 8, 9], [1, 2, 3, 4, 5]])
    given = {"position_ids": positions, "num_beams": beams, **CACHES[cache]}
    out = generate(model, ids, **given)
    if beams == 1:
        expected = ids
        for step in range(OPTIONS["max_new_tokens"]):
            more = positions[:, -1:] + torch.arange(1, step + 1)
            logits = model(
                expected, attention_mask=torch.ones_like(expected), use_cache=False,
                position_ids=torch.cat([positions, more], dim=1),
            ).logits[:, -1, 1:]  # fmt: skip
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True) + 1], dim=1)
        assert torch.equal(out, expected[:, 5:])
    else:
        assert torch.equal(out, generate(model, ids, **{**given, **CACHES["none"]}))
    plain = generate(model, ids, num_beams=beams, **CACHES[cache])
    assert torch.equal(out[0], plain[0]) == (model.config.scheme == "dape3-nope")


WAYS = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "an assistant": {"assistant_model": None},
    "an early exit": {"assistant_early_exit": 1},
    "a prompt in pieces": {"prefill_chunk_size": 2},
    "checkpointed layers": {},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate_gives_the_greedy_tokens(model, way):
    ids, mask = tokens(1, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    expected, options = generate(model, ids, mask), dict(WAYS[way])
    if "assistant_model" in options:
        options["assistant_model"] = copy.deepcopy(model)
        options["assistant_model"].lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    if way == "checkpointed layers":
        model.train().gradient_checkpointing_enable()
    assert torch.equal(generate(model, ids, mask, **options), expected)


@pytest.mark.parametrize("padding", [0, 3])
def test_generation_goes_on_from_a_cache(model, padding):
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    ids[0, :padding], mask[0, :padding] = 0, 0
    expected = generate(model, ids, mask)
    given = {"suppress_tokens": [0], **OPTIONS}
    first = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, **{**given, "max_new_tokens": 4}
    )
    seen = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
    rest = model.generate(
        first.sequences, attention_mask=seen, past_key_values=first.past_key_values,
        **{**given, "max_new_tokens": 5},
    )  # fmt: skip
    assert torch.equal(rest[:, 6:], expected)


def test_a_prompt_in_pieces_needs_positions_of_all_keys(model):
    positions = torch.tensor([[0, 3, 4, 8, 9]])
    with pytest.raises(UserError, match=r"position_ids \[1, 2\] must be those of all 4") as error:
        generate(model, tokens(1, 5), position_ids=positions, prefill_chunk_size=2)
    assert "\n" not in str(error.value)


def test_beams_are_the_same_in_every_cache(model):
    ids, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    ids[0, :2], mask[0, :2] = 0, 0
    beams = [generate(model, ids, mask, num_beams=3, **options) for options in CACHES.values()]
    assert torch.equal(beams[0], beams[1]) and torch.equal(beams[0], beams[2])


def test_generating_far_past_the_training_length(model):
    ids = tokens(1, 3)
    options = {**OPTIONS, "max_new_tokens": 40}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert out.shape == (1, 3 + 40)
    last = model(out[:, :-1], use_cache=False).logits[:, -1].argmax(-1)
    assert torch.equal(out[:, -1], last)


def test_embeddings_start_a_generation_as_their_ids_do(model):
    ids = tokens(2, 5)
    embeddings = model.model.embed_tokens(ids)
    mask = torch.ones_like(ids)
    out = model.generate(
        inputs_embeds=embeddings, attention_mask=mask, suppress_tokens=[0], **OPTIONS
    )
    assert torch.equal(out, generate(model, ids))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_returns_the_weights_and_states_of_one_whole_pass(model, cache):
    ids = tokens(2, 5)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True,
        output_attentions=True, output_hidden_states=True, **OPTIONS, **CACHES[cache],
    )  # fmt: skip
    whole = model(
        out.sequences[:, :-1], output_attentions=True, output_hidden_states=True, use_cache=False
    )
    assert len(out.attentions) == len(out.hidden_states) == OPTIONS["max_new_tokens"]
    for layer in range(2):
        for step in range(OPTIONS["max_new_tokens"]):
            seen = 5 + step
            weights = out.attentions[step][layer][:, :, -1]
            assert not weights[..., seen:].any()
            expected = whole.attentions[layer][:, :, seen - 1, :seen]
            assert_close(weights[..., :seen], expected, rtol=1e-9, atol=1e-9)
            state = out.hidden_states[step][layer + 1][:, -1]
            assert_close(state, whole.hidden_states[layer + 1][:, seen - 1], rtol=1e-9, atol=1e-9)


def test_positions_drawn_in_training_do_not_go_through_a_cache():
    model, ids = grown(scheme="randomized-rope"), tokens(1, 5)
    expected = generate(model, ids)
    with pytest.raises(UserError, match=r"in training; leave past_key_values out, or .*eval"):
        generate(model.train(), ids)
    assert torch.equal(generate(model.eval(), ids, use_cache=False), expected)


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_a_cache_of_a_sliding_window_is_refused(cache):
    """Keys before the window are gone, and the model would take the rest for the first keys."""
    how = {"max_cache_len": 20} if cache is StaticCache else {}
    config = MistralConfig(num_hidden_layers=2, sliding_window=4)
    with pytest.raises(UserError, match=r"^past_key_values .* give a cache of this model") as error:
        grown(scheme="kerple")(tokens(1, 6), past_key_values=cache(config=config, **how))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scheme", ["dape-kerple", "learned"])
def test_a_prompt_that_ends_in_hidden_tokens_is_refused(scheme):
    """Generation would go on from the logits of a hidden token."""
    model, ids = grown(scheme=scheme), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with pytest.raises(UserError, match="hides the last token of a prompt, and gener") as e:
        generate(model, ids, mask)
    assert "\n" not in str(e.value)
    ids[0, 4:] = 0  # known as padding without a mask
    with pytest.raises(UserError, match="hides the last token of a prompt"):
        model.generate(ids, **OPTIONS)


@torch.no_grad()
def test_a_cache_that_does_not_fit_is_refused():
    model, ids = grown(scheme="dape-kerple"), tokens(2, 6)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    for rows, more in ((ids[:1], 1), (ids.repeat(2, 1), 4)):
        with pytest.raises(UserError, match=f"holds keys of 2 rows, and the call has {more}"):
            model(rows, past_key_values=cache)
    cache = StaticCache(model.config, max_cache_len=8)
    found = [model(piece, past_key_values=cache).logits for piece in ids.split([4, 2], 1)]
    assert_close(torch.cat(found, 1), model(ids).logits, rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="without room for the new keys: give a greater max_cach"):
        model(ids[:, :3], past_key_values=cache)
    more, whole = ids[:, :2], torch.cat([ids, ids[:, :2]], 1)
    found = model(more, past_key_values=cache).logits
    assert_close(found, model(whole).logits[:, 6:], rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="without room for the new keys"):
        model(tokens(2, 9), past_key_values=StaticCache(model.config, max_cache_len=8))


class Kept(QuantizedLayer):
    """A quantized layer that keeps every bit, for which others need a package."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


@pytest.mark.parametrize("scheme", ["dape-kerple", "dape3-nope", "dape-fire", "rope", "learned"])
@torch.no_grad()
def test_a_quantized_cache_goes_through_and_is_refused_once_cropped(scheme):
    """`crop` leaves the quantized keys and the count, and distances would be counted from it."""
    model, ids = grown(scheme=scheme), tokens(2, 14)
    cache = Cache(layers=[Kept(residual_length=4) for _ in range(2)])
    pieces = [
        model(piece, past_key_values=cache).logits for piece in ids[:, :13].split([6, *7 * [1]], 1)
    ]
    expected = model(ids).logits
    assert_close(torch.cat(pieces, 1), expected[:, :13], rtol=0, atol=1e-9)
    cache.crop(-1)
    with pytest.raises(UserError, match="holds 13 keys, and transformers counts 14 for the mask"):
        model(ids[:, 13:], past_key_values=cache)


@pytest.mark.parametrize("retrofitted", [False, True])
@torch.no_grad()
def test_a_cache_that_generate_would_not_go_on_from_is_refused(retrofitted):
    """Each step would read all tokens again, behind the cached keys."""
    model, ids = grown(scheme="dape-kerple"), tokens(2, 6)
    if retrofitted:
        model = pretrained("llama", torch.float64)
        dape.retrofit(model, bias="kerple")
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], past_key_values=cache)
    with pytest.raises(UserError, match=r"^use_cache=False, .* say use_cache=True, or le") as error:
        generate(model, ids, past_key_values=copy.deepcopy(cache), use_cache=False)
    assert "\n" not in str(error.value)
    embeddings = model.get_input_embeddings()(ids[:, 4:])
    for given in ({"inputs": ids[:, 4:]}, {"inputs": ids[:, :4]}, {"inputs_embeds": embeddings}):
        with pytest.raises(UserError, match=r"^past_key_values holds 4 keys, .* no more") as error:
            model.generate(**given, past_key_values=copy.deepcopy(cache), **OPTIONS)
        assert "\n" not in str(error.value)
    new = generate(model, ids[:, 4:], torch.ones_like(ids), past_key_values=copy.deepcopy(cache))
    assert torch.equal(new, generate(model, ids))
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_of_an_encoder_is_refused(name):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(UserError, match=r"past_key_values is a EncoderDecoderCache; give a Cache"):
        grown(scheme="rope")(tokens(1, 3), **{name: cache})


def test_tokens_that_generate_would_not_read_are_refused():
    model, ids = grown(scheme="dape-kerple"), tokens(1, 6)
    with pytest.raises(UserError, match="prefill_chunk_size splits input_ids"):
        model.prepare_inputs_for_generation(ids[:, :0])
    with pytest.raises(UserError, match="logits_to_keep=-2 must be at least 0"):
        model(ids, logits_to_keep=-2)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("retrofitted", [False, True])
@torch.no_grad()
def test_a_mask_without_the_new_keys_is_refused(kind, retrofitted):
    """The columns of the new keys would be those of cached ones, and the new keys hidden."""
    model, ids = grown(scheme="dape-kerple"), tokens(2, 7)
    if retrofitted:
        model = pretrained("llama")
        dape.retrofit(model, bias="kerple")
    cache = kind(config=model.config, **({"max_cache_len": 12} if kind is StaticCache else {}))
    model(ids[:, :4], past_key_values=cache)
    for columns in (3, 4, 6):
        mask, words = (
            torch.ones_like(ids[:, :columns]),
            r"must cover 4 cached|fewer columns than ca",
        )
        with pytest.raises(UserError, match=words):
            model(ids[:, 4:], attention_mask=mask, past_key_values=cache)
