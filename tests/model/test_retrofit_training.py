"""Adapters that the Trainer of transformers trains, and PEFT's LoRA beside them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pretrained import logits, pretrained, tokens
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

import dape

LORA = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "dape-rope": ["q_proj"]}
lora_models = pytest.mark.parametrize("name", LORA)


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
