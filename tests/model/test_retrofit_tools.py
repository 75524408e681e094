"""Adapters beside what others do to a model: attentions, files, quantisation, offloading."""

import copy
import io
import pickle

import pytest
import torch
from pretrained import NAMES, bias_for, logits, move, pretrained, tokens
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import dape
from dape.errors import UserError
from dape.model.retrofit.unchanged import own_states, states

every_model = pytest.mark.parametrize("name", NAMES)


def mounted_and_moved(name):
    model = pretrained(name)
    mounted = dape.retrofit(model, bias=bias_for(name))
    move(mounted.adapters, 0.3)
    return model, mounted


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("by", ["method", "configuration"])
@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_another_attention_never_leaves_the_adapters_out(name, by, other):
    model, mounted = mounted_and_moved(name)
    ids = tokens(2, 9)
    expected = logits(model, ids)
    if by == "method":
        model.set_attn_implementation(other)
    else:
        model.config._attn_implementation = other
    words = f"attn_implementation='{other}' would leave out the mounted adapters; call"
    with pytest.raises(UserError, match=words) as error:
        logits(model, ids)
    assert "\n" not in str(error.value)
    model.set_attn_implementation("dape")
    assert torch.equal(logits(model, ids), expected)
    mounted.unmount()
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model, ids), logits(pretrained(name), ids))


def test_a_model_by_the_attention_of_adapters_but_without_any_is_refused(tmp_path):
    """TRL loads a reference model by the name of the base and the attention of the policy."""
    model, _ = mounted_and_moved("llama")
    model.save_pretrained(tmp_path)
    implementation = model.config._attn_implementation
    base = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    ids = tokens(2, 9)
    with pytest.raises(UserError, match="the model has no mounted adapters, as a ref") as error:
        logits(base.eval(), ids)
    assert "\n" not in str(error.value)
    dape.load_adapters(base, tmp_path)
    assert torch.equal(logits(base, ids), logits(model, ids))


@every_model
def test_a_saved_model_and_the_adapters_beside_it_are_the_model(name, tmp_path):
    model, _ = mounted_and_moved(name)
    ids = tokens(2, 9)
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=pretrained(name).config._attn_implementation
    )
    assert torch.equal(logits(base.eval(), ids), logits(pretrained(name), ids))
    dape.load_adapters(base, tmp_path)
    assert torch.equal(logits(base, ids), logits(model, ids))


def test_what_is_shared_holds_the_adapters(tmp_path):
    model, _ = mounted_and_moved("llama")
    with pytest.raises(UserError, match=r"call model\.push_to_hub") as error:
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


def test_parts_that_trained_are_in_the_saved_model_itself(tmp_path):
    model, ids = pretrained("llama"), tokens(2, 9)
    dape.retrofit(model, bias="kerple", train=["adapters", "lm_head"])
    move(model, 0.1)
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(base.lm_head.weight, model.lm_head.weight)
    dape.load_adapters(base, tmp_path)
    assert torch.equal(logits(base, ids), logits(model, ids))


def test_unmounted_models_are_saved_as_before(tmp_path):
    model, mounted = mounted_and_moved("llama")
    mounted.unmount()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapters.json").exists()


@pytest.mark.parametrize("name", ["llama", "bloom", "dape-rope"])
def test_mounted_models_are_copied_and_pickled_with_their_adapters(name, tmp_path):
    model, _ = mounted_and_moved(name)
    ids = tokens(2, 9)
    expected = logits(model, ids)
    file = io.BytesIO(pickle.dumps(model))
    for other in (copy.deepcopy(model), pickle.load(file)):
        assert torch.equal(logits(other, ids), expected)
        move(other, 0.1)
        assert torch.equal(logits(model, ids), expected)
        other.save_pretrained(tmp_path)
        base = AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation=pretrained(name).config._attn_implementation
        )
        dape.load_adapters(base.eval(), tmp_path)
        assert torch.equal(logits(base, ids), logits(other, ids))


def test_the_start_is_compared_with_scores_that_are_not_rounded():
    """In bfloat16 the eager code rounds scores near 2,000 by units; PyTorch's own does not."""
    model = pretrained("gpt2", torch.bfloat16)
    for layer in model.transformer.h:
        query, key, _ = layer.attn.c_attn.bias.data.chunk(3)
        query += 60
        key += 15
    modules = [layer.attn for layer in model.transformer.h]
    into, own = own_states(model, modules)
    found = {}
    for name in ("sdpa", "eager"):
        model.config._attn_implementation = name
        _, found[name] = states(model, modules, into)
    for module in modules:
        exact, rounded = found["sdpa"][module], found["eager"][module]
        assert (rounded - exact).abs().max() > 0.1 * exact.abs().max()
        assert (own[module] - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mpt", "falcon", "dape-rope"])
def test_each_attention_is_compared_by_itself(name):
    """So that rounding in one layer, which may change all after it, refuses no model."""
    model = pretrained(name)
    mounted = dape.retrofit(model)
    modules = mounted.attentions
    into, out = states(model, modules)
    assert list(into) == list(out) == list(modules)
    for parameter in model.get_input_embeddings().parameters():
        parameter.data *= -1
    _, same = states(model, modules, into)
    _, other = states(model, modules)
    for module in modules:
        assert torch.equal(same[module], out[module])
        assert (other[module] - out[module]).abs().max() > 1e-3


class Buffered(nn.Module):
    """A linear layer of buffers alone, as those of GPTQ and AWQ."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("packed", linear.weight.detach().clone())
        self.register_buffer("shift", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.packed, self.shift)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "bloom", "falcon-alibi", "dape-rope"])
def test_layers_without_parameters_are_served(name):
    model, ids = pretrained(name), tokens(2, 9)
    expected = logits(model, ids)
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child is not model.get_output_embeddings():
                setattr(module, child_name, Buffered(child))
    for module in dape.retrofit(model).attentions:
        new = {id(each) for each in module.adapter.parameters()}
        assert {id(each) for each in module.parameters()} == new
    assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "dape-rope"])
def test_adapters_of_a_model_on_disk_are_in_memory(name, tmp_path):
    model, ids = pretrained(name), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    kind = model.config._attn_implementation
    pieces = {n.rpartition(".")[0] for n in model.state_dict()}
    disk = {each: "disk" for each in pieces}
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=disk, offload_folder=tmp_path / "weights",
        attn_implementation=kind,
    )  # fmt: skip
    assert any(parameter.is_meta for parameter in placed.parameters())
    expected = logits(placed.eval(), ids)
    mounted = dape.retrofit(placed, bias=bias_for(name))
    assert all(parameter.device.type == "cpu" for parameter in mounted.adapters.parameters())
    assert_close(logits(placed, ids), expected, rtol=0, atol=1e-5)
    move(mounted.adapters, 0.3)
    mounted.save(tmp_path / "adapters")
    dape.load_adapters(model, tmp_path / "adapters")
    assert_close(logits(placed, ids), logits(model, ids), rtol=1e-5, atol=1e-5)


def test_one_process_of_several_writes_the_files(tmp_path):
    model, _ = mounted_and_moved("llama")
    model.save_pretrained(tmp_path / "second", is_main_process=False)
    assert not list((tmp_path / "second").glob("adapters.*"))
    model.save_pretrained(tmp_path / "first", is_main_process=True)
    assert len(list((tmp_path / "first").glob("adapters.*"))) == 2
