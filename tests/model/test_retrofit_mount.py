"""Adapters in pretrained models: what changes nothing at first, what trains, what comes back."""

import pytest
import torch
from pretrained import (
    GROUPED,
    NAMES,
    VOCABULARY,
    bias_for,
    logits,
    move,
    padded,
    pretrained,
    tokens,
)
from torch.testing import assert_close
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MoshiConfig,
    MoshiForCausalLM,
    MptConfig,
    MptForCausalLM,
)

import dape

every_model = pytest.mark.parametrize("name", NAMES)
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-6}


@every_model
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_logits_start_as_the_models_own(name, dtype):
    model, ids = pretrained(name, dtype), tokens(2, 12)
    expected = logits(model, ids)
    mounted = dape.retrofit(model, adapter="dape", bias=bias_for(name))
    assert len(mounted.adapters) == 2 and expected.std() > 0.1
    assert_close(logits(model, ids), expected, rtol=0, atol=DTYPES[dtype])


@every_model
def test_left_padding_starts_as_the_models_own(name):
    model = pretrained(name)
    ids, mask = padded()
    expected = logits(model, ids, attention_mask=mask)
    dape.retrofit(model, bias=bias_for(name))
    seen = mask.bool()
    found = logits(model, ids, attention_mask=mask)
    assert_close(found[seen], expected[seen], rtol=0, atol=1e-5)


@every_model
def test_unmounting_gives_the_model_back_to_the_bit(name):
    model, ids = pretrained(name), tokens(2, 12)
    expected, state = logits(model, ids), {k: v.clone() for k, v in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    mounted = dape.retrofit(model, bias=bias_for(name), train=("adapters", "all"))
    move(model, 0.1)
    assert (logits(model, ids) - expected).abs().max() > 1e-3
    mounted.unmount()
    mounted.unmount()
    assert torch.equal(logits(model, ids), expected)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.config._attn_implementation == pretrained(name).config._attn_implementation
    dape.retrofit(model, bias=bias_for(name))


@every_model
def test_gradients_reach_the_adapters_alone_and_a_step_moves_the_logits(name):
    model, ids = pretrained(name).train(), tokens(2, 12)
    mounted = dape.retrofit(model, bias=bias_for(name))
    assert all(
        module.training for module in model.modules() if "dape" not in type(module).__module__
    )
    before = logits(model.eval(), ids)
    optimizer = torch.optim.SGD(mounted.adapters.parameters(), lr=10.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    new = {id(parameter) for parameter in mounted.adapters.parameters()}
    for where, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in new), where
        if id(parameter) in new:
            assert parameter.grad is not None and parameter.grad.any(), where
        else:
            assert parameter.grad is None, where
    assert (logits(model, ids) - before).abs().max() > 1e-4


def test_a_model_whose_own_code_is_causal_by_its_mask_alone():
    sizes = {name: GROUPED[name] for name in GROUPED if name != "intermediate_size"}
    model = MoshiForCausalLM(MoshiConfig(**sizes, head_dim=6, ffn_dim=20)).eval()
    model.config._attn_implementation = "eager"
    move(model, 0.1)
    ids, mask = padded()
    expected = logits(model, ids, attention_mask=mask)
    dape.retrofit(model, bias="kerple")
    seen = mask.bool()
    found = logits(model, ids, attention_mask=mask)
    assert_close(found[seen], expected[seen], rtol=0, atol=1e-5)
    without = logits(model, ids[1:])
    assert_close(without, expected[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"clip_qkv": 0.2}, {"softmax_scale": 1.5}])
def test_mpt_clips_and_scales_as_its_configuration_says(settings):
    sizes = {"vocab_size": VOCABULARY, "d_model": 24, "n_layers": 2, "n_heads": 6}
    model, ids = (
        move(MptForCausalLM(MptConfig(**sizes, attn_config=settings)).eval(), 0.1),
        tokens(2, 12),
    )
    expected = logits(model, ids)
    dape.retrofit(model)
    assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)


def test_dropout_of_a_layers_output_goes_on_in_training():
    """Bloom's attention drops its output itself, with the numbers that its own code would draw."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "n_layer": 2, "n_head": 6}
    model = move(BloomForCausalLM(BloomConfig(**sizes, hidden_dropout=0.5)), 0.1).train()
    ids, found = tokens(2, 12), []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(logits(model, ids))
        if len(found) == 1:
            dape.retrofit(model)
    assert_close(found[1], found[0], rtol=0, atol=1e-5)
    assert (logits(model.eval(), ids) - found[0]).abs().max() > 0.1


def test_parts_in_evaluation_mode_stay_so_in_a_model_that_trains():
    model = pretrained("gpt2").train()
    model.transformer.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    mounted = dape.retrofit(model)
    mounted.unmount()
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_bias_starts_with_its_options_and_with_the_length_of_the_model():
    mounted = dape.retrofit(pretrained("llama"), bias="fire", options={"bias": {"hidden": 7}})
    for each in mounted.adapters:
        fire = each["position_bias"]
        assert fire.weight_in.shape == (7, 1)
        assert_close(fire.log_threshold.exp().item(), 64.0)  # max_position_embeddings


@pytest.mark.parametrize("adapter", ["dape", "cope", "transformer-xl"])
def test_values_may_be_narrower_than_keys(adapter):
    sizes = {**GROUPED, "num_key_value_heads": 4, "moe_intermediate_size": 8, "q_lora_rank": 8}
    ranks = {"kv_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
    config = DeepseekV3Config(**sizes, **ranks, first_k_dense_replace=2, n_group=1, topk_group=1)
    model, ids = move(DeepseekV3ForCausalLM(config).eval(), 0.1), tokens(2, 12)
    expected = logits(model, ids)
    mounted = dape.retrofit(model, adapter)
    assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    move(mounted.adapters, 0.3)
    assert (logits(model, ids) - expected).abs().max() > 0.01
