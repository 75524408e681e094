"""Causality does not hang on what transformers knows of an attention function."""

import pytest
from models import SIZES, fresh, grown, tokens
from pretrained import pretrained
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dape
from dape.errors import UserError
from dape.model.modeling import DapeForCausalLM

LEAKY, HUB = "without_its_mask", "kernels-community/flash-attn"


@pytest.fixture(autouse=True)
def leaky(monkeypatch):
    """An attention registered without a mask function: transformers gives it no mask at all."""

    def attend(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        return sdpa_attention_forward(module, query, key, value, None, is_causal=False, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, LEAKY, attend)


def change_before_the_last(model):
    """Return how far the last token moves the logits of those before it."""
    ids = tokens(1, 9)
    other = ids.clone()
    other[:, -1] = ids[:, -1] % (SIZES["vocab_size"] - 1) + 1
    return (model(ids).logits - model(other).logits)[:, :-1].abs().max()


def test_an_attention_without_its_mask_function_sees_the_future_in_another_model():
    sizes = {name: size for name, size in SIZES.items() if name != "train_length"}
    config = LlamaConfig(**sizes, attn_implementation=LEAKY)
    assert change_before_the_last(LlamaForCausalLM(config).eval()) > 1e-4
    config = LlamaConfig(**sizes, attn_implementation="eager")
    assert change_before_the_last(LlamaForCausalLM(config).eval()) == 0


@pytest.mark.parametrize("name", [LEAKY, "sdpa", "flash_attention_2", "flex_attention", HUB])
def test_ours_refuses_an_attention_of_transformers(name, tmp_path):
    fresh().save_pretrained(tmp_path)
    words = f"attn_implementation='{name}': .* by backend='auto' .*; leave it out, or say 'eager'"
    with pytest.raises(UserError, match=words) as error:
        DapeForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    assert "\n" not in str(error.value)
    model = fresh()
    with pytest.raises(UserError, match=words):
        model.set_attn_implementation(name)
    model.set_attn_implementation("eager")


def test_ours_refuses_batches_that_are_packed_into_pages():
    retrofitted = pretrained("llama")
    dape.retrofit(retrofitted)
    for model in (fresh(eos_token_id=1), retrofitted):
        with pytest.raises(UserError, match=r"continuous batching keep the keys .* call generate"):
            model.generate_batch([[2, 3, 4], [5, 6]])


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_ours_sees_no_future_however_it_is_computed(backend):
    model = grown(scheme="dape3-kerple", attn_implementation="eager", backend=backend)
    assert change_before_the_last(model) == 0
