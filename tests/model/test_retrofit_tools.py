"""Adapters beside what others do to a model: attentions, files, LoRA, quantisation, offloading."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pretrained import NAMES, bias_for, move, pretrained, tokens
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import dape
from dape.errors import UserError
from dape.model.retrofit.unchanged import own_states, states

every_model = pytest.mark.parametrize("name", NAMES)
LORA = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "dape-rope": ["q_proj"]}
lora_models = pytest.mark.parametrize("name", LORA)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


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


def trainer(model, folder):
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        save_steps=2, use_cpu=True, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(8, 12)]
    return Trainer(model, arguments, train_dataset=data)


def test_the_trainer_saves_and_resumes_the_adapters(tmp_path):
    torch.manual_seed(1)
    first = pretrained("llama")
    dape.retrofit(first, bias="kerple")
    trainer(first, tmp_path / "first").train()
    torch.manual_seed(1)
    second = pretrained("llama")
    mounted = dape.retrofit(second, bias="kerple")
    again = trainer(second, tmp_path / "second")
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    for ours, theirs in zip(second.parameters(), first.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert any(parameter.abs().max() > 1e-3 for parameter in mounted.adapters.parameters())
    loaded = dape.load_adapters(pretrained("llama"), tmp_path / "first" / "checkpoint-4").model
    ids = tokens(2, 9)
    assert torch.equal(logits(loaded, ids), logits(first.eval(), ids))


def beside_peft():
    """Expect the warning about adapters outside PEFT's folders; ours train by themselves."""
    return pytest.warns(UserWarning, match="folders, .* leave out the mounted adapters: say Lora")


def lora(name, **options):
    options["fan_in_fan_out"] = name == "gpt2"  # its linear layers are transposed
    return LoraConfig(r=2, target_modules=LORA[name], **options)


def learn(model, steps=3):
    ids = tokens(2, 9)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=5.0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@lora_models
def test_lora_and_adapters_train_save_and_load_beside_each_other(name, tmp_path):
    base = pretrained(name)
    mounted = dape.retrofit(base, bias="kerple")
    model = get_peft_model(base, lora(name))
    with pytest.warns(UserWarning, match="the mounted adapters do not train: .* frozen"):
        learn(model, steps=1)
    mounted.adapters.requires_grad_(True)
    before = [each.detach().clone() for each in mounted.adapters.parameters()]
    with beside_peft():
        learn(model)
    changed = [
        not torch.equal(*pair) for pair in zip(before, mounted.adapters.parameters(), strict=True)
    ]
    assert all(changed)
    ids = tokens(2, 9)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "lora")
    mounted.save(tmp_path / "dape")
    other = pretrained(name)
    dape.load_adapters(other, tmp_path / "dape")
    loaded = PeftModel.from_pretrained(other, str(tmp_path / "lora")).eval()
    assert torch.equal(logits(loaded, ids), expected)


@lora_models
def test_the_copies_that_peft_trains_are_those_that_are_saved(name, tmp_path):
    base = pretrained(name)
    mounted = dape.retrofit(base, bias="kerple")
    model = learn(get_peft_model(base, lora(name, modules_to_save=["adapter", "position_bias"])))
    assert any(each.abs().max() > 1e-2 for each in mounted.adapters.parameters())
    assert all(each.requires_grad for each in mounted.adapters.parameters())
    ids = tokens(2, 9)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "both")
    mounted.save(tmp_path / "dape")
    # PEFT's own folder holds both; ours goes with one of LoRA alone.
    other = pretrained(name)
    dape.retrofit(other, bias="kerple")
    loaded = PeftModel.from_pretrained(other, str(tmp_path / "both")).eval()
    assert torch.equal(logits(loaded, ids), expected)
    with loaded.disable_adapter():
        assert_close(logits(loaded, ids), logits(pretrained(name), ids), rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-4)
    mounted.save(tmp_path / "merged")
    for folder in ("dape", "merged"):
        plain = pretrained(name)
        handle = dape.load_adapters(plain, tmp_path / folder)
        for ours, theirs in zip(
            handle.adapters.parameters(), mounted.adapters.parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)


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


def test_the_trainer_resumes_lora_and_the_adapters_that_peft_saves(tmp_path):
    """As the first run goes on; without `modules_to_save` a warning names what would be lost."""

    def begin(folder, **options):
        torch.manual_seed(1)
        model = pretrained("llama")
        dape.retrofit(model, bias="kerple")
        return trainer(get_peft_model(model, lora("llama", **options)), folder)

    whole = {"modules_to_save": ["adapter", "position_bias"]}
    first = begin(tmp_path / "first", **whole)
    first.train()
    second = begin(tmp_path / "second", **whole)
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    third = begin(tmp_path / "third")
    for name, parameter in third.model.named_parameters():
        parameter.requires_grad_("adapter." in name)
    with beside_peft():
        third.train()
