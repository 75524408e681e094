"""The two styles of block, against transformers' own models of the same weights."""

import pytest
import torch
from models import SIZES, fresh, tokens
from torch.testing import assert_close
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from dape.model.configuration import DapeConfig

EPS = 1e-5
SHARED = {name: size for name, size in SIZES.items() if name != "train_length"}


def llama(**config):
    """Return Llama at our small sizes, each of its weights far from its start."""
    model = LlamaForCausalLM(LlamaConfig(**SHARED, rms_norm_eps=EPS, **config)).eval()
    return moved(model)


def neox(rotated):
    """Return GPT-NeoX at our small sizes, with attention before the feed-forward layer."""
    sizes = {name: size for name, size in SHARED.items() if name != "num_key_value_heads"}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotated}
    config = GPTNeoXConfig(
        **sizes, use_parallel_residual=False, layer_norm_eps=EPS, rope_parameters=rope
    )
    return moved(GPTNeoXForCausalLM(config).eval())


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def from_neox(model):
    """Return the weights of GPT-NeoX under our names, query, key and value apart."""
    names = {
        "gpt_neox.": "model.",
        "embed_out.": "lm_head.",
        "embed_in.": "embed_tokens.",
        "final_layer_norm.": "norm.",
        "attention.dense.": "self_attn.o_proj.",
        "dense_h_to_4h.": "up_proj.",
        "dense_4h_to_h.": "down_proj.",
    }
    ours = {}
    for name, weight in model.state_dict().items():
        for theirs, new in names.items():
            name = name.replace(theirs, new)
        if "query_key_value" in name:
            heads = SIZES["num_attention_heads"]
            for part, piece in zip(
                "qkv", weight.unflatten(0, (heads, 3, -1)).unbind(1), strict=True
            ):
                new = name.replace("attention.query_key_value", f"self_attn.{part}_proj")
                ours[new] = piece.flatten(0, 1)
        else:
            ours[name] = weight
    return ours


def modern(theirs, **config):
    """Return our modern block with the weights of Llama, which have the same names."""
    model = fresh(scheme="rope", block="modern", layer_norm_eps=EPS, **config)
    model.load_state_dict(theirs.state_dict())
    return model


def padded():
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    return ids, mask


@pytest.mark.parametrize("tie", [False, True])
def test_the_modern_block_under_rope_is_llama(tie):
    theirs = llama(tie_word_embeddings=tie)
    ours = modern(theirs, tie_word_embeddings=tie)
    ids, mask = padded()
    seen = mask.bool()
    expected = theirs(ids, attention_mask=mask).logits[seen]
    assert expected.std() > 0.5
    assert_close(ours(ids, attention_mask=mask).logits[seen], expected, rtol=1e-5, atol=1e-5)


def test_the_modern_block_has_the_gradients_of_llama():
    theirs, ids = llama(), tokens(2, 9)
    ours = modern(theirs)
    losses = [model(ids, labels=ids).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    assert_close(losses[0], losses[1])
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_modern_block_generates_what_llama_does(cache, beams):
    theirs = llama()
    ids, mask = padded()
    options = {
        "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams,
        "pad_token_id": 0, "eos_token_id": None, "cache_implementation": cache,
    }  # fmt: skip
    out = modern(theirs).generate(ids, **options)
    assert torch.equal(out, theirs.generate(ids, **options))
    assert out[:, 9:].unique().numel() > 3


@pytest.mark.parametrize(("scheme", "rotated"), [("rope", 1.0), ("partial-rope", 0.25)])
def test_the_papers_block_is_gpt_neox(scheme, rotated):
    theirs = neox(rotated)
    ours = fresh(scheme=scheme, num_key_value_heads=None, layer_norm_eps=EPS)
    ours.load_state_dict(from_neox(theirs))
    ids, mask = padded()
    seen = mask.bool()
    # It derives no positions from the mask, but takes them.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits[seen]
    assert expected.std() > 0.5
    assert_close(ours(ids, attention_mask=mask).logits[seen], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [24, 128, 768, 4096])
def test_the_feed_forward_layers_of_both_blocks_have_as_many_weights(width):
    sizes = {"hidden_size": width, "num_attention_heads": 1}
    paper = 2 * width * DapeConfig(**sizes).feed_forward_size
    wide = DapeConfig(**sizes, block="modern").feed_forward_size
    assert wide % 64 == 0 and 3 * width * (wide - 64) < paper <= 3 * width * wide
    assert DapeConfig(**sizes, block="modern", intermediate_size=7).feed_forward_size == 7
