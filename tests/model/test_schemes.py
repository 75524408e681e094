"""What must hold for every scheme that has a name."""

import functools

import pytest
import torch
from models import SIZES, fresh, grown, tokens
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from dape.errors import UserError
from dape.model.modeling import DapeForCausalLM
from dape.positions import scheme
from dape.positions.absolute import Learned

# Parts know nothing of each other: every base alone and under V2, every adapter on one base.
NAMES = [
    name
    for name in scheme.names()
    if name in scheme.BASES or name.startswith("dape3-") or name.endswith("-kerple")
]
PLACES = {"position_embedding", "rotation", "position_bias", "adapter"}
every_scheme = pytest.mark.parametrize("name", NAMES)


@functools.cache
def model_of(name):
    """Return a model that no test changes."""
    torch.manual_seed(0)
    return grown(scheme=name).requires_grad_(False)


def near(ours, theirs):
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@every_scheme
def test_a_cache_changes_nothing(name):
    model, ids = model_of(name), tokens(2, 9)
    expected = model(ids, use_cache=False).logits
    caches = (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=12))
    for cache in caches:
        pieces = [
            model(piece, past_key_values=cache).logits for piece in ids.split([4, 1, 3, 1], 1)
        ]
        near(torch.cat(pieces, 1), expected)


@every_scheme
def test_left_padding_changes_nothing(name):
    model, ids = model_of(name), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    expected = model(ids[:1, 4:], use_cache=False).logits[0]
    prefill = model(ids[:, :7], attention_mask=mask[:, :7])
    last = model(ids[:, 7:], attention_mask=mask, past_key_values=prefill.past_key_values)
    near(torch.cat([prefill.logits[0, 4:], last.logits[0]]), expected)


@every_scheme
def test_no_logit_depends_on_later_tokens_or_on_the_length(name):
    model, ids = model_of(name), tokens(1, 9)
    changed = ids.clone()
    changed[:, 5:] = ids[:, 5:] % (SIZES["vocab_size"] - 1) + 1
    whole, other, part = (model(x, use_cache=False).logits for x in (ids, changed, ids[:, :5]))
    assert torch.equal(whole[:, :5], other[:, :5])
    assert (whole[:, 5:] != other[:, 5:]).any(-1).all()
    near(whole[:, :5], part)


@every_scheme
def test_tokens_are_told_apart_by_their_order(name):
    model, ids = model_of(name), torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]])
    first, second = model(ids, use_cache=False).logits[:, -1]
    assert (first - second).abs().max() > 1e-6 or name == "nope"


@every_scheme
def test_shared_key_heads_equal_repeated_ones(name):
    model, ids = model_of(name), tokens(1, 7)
    heads, kv_heads = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    state = {
        key: value.unflatten(0, (kv_heads, -1))
        .repeat_interleave(heads // kv_heads, 0)
        .flatten(0, 1)
        if ".k_proj." in key or ".v_proj." in key
        else value
        for key, value in model.state_dict().items()
    }
    repeated = fresh(scheme=name, num_key_value_heads=heads).double()
    repeated.load_state_dict(state)
    near(repeated(ids).logits, model(ids).logits)


@every_scheme
def test_saving_and_loading_changes_no_bit_and_bfloat16_spares_positions(name, tmp_path):
    model, ids = fresh(scheme=name), tokens(1, 7)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    loaded = DapeForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    for where, parameter in DapeForCausalLM.from_pretrained(
        tmp_path, dtype="bfloat16"
    ).named_parameters():
        small = PLACES & set(where.split("."))
        expected = model.get_parameter(where).to(torch.float32 if small else torch.bfloat16)
        assert parameter.dtype == expected.dtype and torch.equal(parameter, expected), where


@every_scheme
def test_reading_far_past_the_training_length(name):
    model = fresh(scheme=name, train_length=4)
    if isinstance(model.model.position_embedding, Learned):
        with pytest.raises(UserError, match="train_length=4"):
            model(tokens(1, 33))
    else:
        assert model(tokens(1, 33)).logits.isfinite().all()


@every_scheme
def test_gradients_reach_every_parameter(name):
    model, ids = grown(scheme=name).train(), tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    for where, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), where
        assert parameter.grad.any(), where
