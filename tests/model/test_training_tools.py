"""Others' training tools on the models: PEFT's LoRA, TRL and the Trainer of transformers."""

import copy
import math

import pytest
import torch
from models import fresh, grown, tokens
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from pretrained import move, pretrained
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import dape
from dape.errors import UserError
from dape.model.modeling import DapeForCausalLM

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def learn(model, steps):
    """Train for some steps on one batch, and return the loss of each."""
    ids = tokens(2, 9)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}),
        ({"target_modules": "all-linear"}, set(PROJECTIONS)),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["position_bias", "adapter"]},
            {"q_proj", "position_bias", "adapter"},
        ),
    ],
    ids=["named", "all linear layers", "with the encoding"],
)
def test_lora_trains_what_it_names_and_survives_its_file(options, expected, tmp_path):
    ids = tokens(2, 9)
    base = fresh(scheme="dape-kerple")
    base.save_pretrained(tmp_path / "base")
    start = base(ids).logits
    frozen = {name: weight.clone() for name, weight in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(r=2, **options))
    assert torch.equal(model(ids).logits, start)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for name in trained:
        assert "lora_" in name or "modules_to_save" in name
    found = {part for name in trained for part in name.split(".") if part in expected}
    assert found == expected
    losses = learn(model.train(), 4)
    assert losses[-1] < losses[0]
    out = model.eval()(ids).logits
    assert (out - start).abs().max() > 1e-3
    for name, weight in model.get_base_model().named_parameters():
        if not ("lora_" in name or "modules_to_save" in name):
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            assert torch.equal(weight, frozen[plain]), name
    model.save_pretrained(tmp_path / "lora")
    base = DapeForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    assert torch.equal(loaded(ids).logits, out)
    assert_close(loaded.merge_and_unload()(ids).logits, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dape3-nope", "dape-t5", "retrofitted"])
def test_lora_of_a_parameter_of_the_encoding_sees_no_later_token(kind):
    model = pretrained("llama") if kind == "retrofitted" else fresh(scheme=kind)
    if kind == "retrofitted":
        dape.retrofit(model, "dape3")
    move(model, 0.2)
    ids = tokens(1, 9)
    start = model(ids).logits
    name = "position_bias.weight" if kind == "dape-t5" else "adapter.weight_in"
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=[name]))
    assert torch.equal(tuned.eval()(ids).logits, start)
    move(tuned, 0.2)
    out = tuned(ids).logits
    assert (out - start).abs().max() > 1e-3
    changed = torch.cat([ids[:, :-1], ids[:, -1:] % 36 + 1], dim=1)
    assert_close(tuned(changed).logits[:, :-1], out[:, :-1])
    assert_close(tuned.merge_and_unload()(ids).logits, out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("retrofitted", [False, True])
@torch.no_grad()
def test_rows_of_a_batch_share_a_trained_encoding(retrofitted):
    model = pretrained("llama") if retrofitted else fresh(scheme="dape-kerple")
    if retrofitted:
        move(dape.retrofit(model, bias="kerple").adapters, 0.2)
    both = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["adapter", "position_bias"],
        init_lora_weights=False,
    )  # fmt: skip
    tuned, ids = get_peft_model(model, both, "first"), tokens(2, 9)
    tuned.add_adapter("second", both)
    for name, parameter in tuned.named_parameters():
        if not {"first", "second"}.isdisjoint(name.split(".")):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    tuned.eval().set_adapter("second")
    expected = tuned(ids).logits
    tuned.set_adapter("first")
    assert (tuned(ids).logits - expected).abs().max() > 0.01
    assert torch.equal(tuned(input_ids=ids, adapter_names=["second"] * 2).logits, expected)
    with pytest.raises(UserError, match="call the model once for each name") as error:
        tuned(input_ids=ids, adapter_names=["first", "second"])
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT's own
@pytest.mark.parametrize("retrofitted", [False, True])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
@torch.no_grad()
def test_tuned_prompts_come_once_in_a_generation(kind, retrofitted):
    model = pretrained("llama", torch.float64) if retrofitted else grown(scheme="dape-kerple")
    if retrofitted:
        move(dape.retrofit(model, bias="kerple").adapters.double(), 0.3)
    model.lm_head.weight.mul_(5)
    tuned = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    move(tuned.prompt_encoder.double(), 0.5)
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    if not retrofitted:  # behind padding, Llama turns by indices without a cache
        ids[0, :2], mask[0, :2] = 0, 0
    expected, seen = ids, mask
    for _ in range(6):
        logits = tuned(input_ids=expected, attention_mask=seen).logits[:, -1, 1:]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True) + 1], dim=1)
        seen = torch.cat([seen, seen[:, -1:]], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}
    out = tuned.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(out[:, 6:], expected[:, 6:])


def trainer(model, folder, **options):
    rows = [(torch.arange(12) + start) % 10 + 1 for start in range(16)]
    arguments = TrainingArguments(
        str(folder), max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, save_steps=6, use_cpu=True, disable_tqdm=True,
        report_to="none", gradient_checkpointing=True, **options,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in rows]
    return Trainer(model, arguments, train_dataset=data)


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("retrofitted", [False, True])
def test_trl_packs_documents_that_are_computed_as_if_alone(retrofitted, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is in the environment of `make newest`")
    model = fresh(scheme="dape-kerple")
    if retrofitted:
        model = fresh(scheme="rope")
        move(dape.retrofit(model, bias="kerple").adapters, 0.3)
    texts = [tokens(length) for length in (4, 3, 5)]
    options = trl.SFTConfig(
        str(tmp_path), max_steps=1, packing=True, max_length=12, per_device_train_batch_size=1,
        learning_rate=0.0, logging_steps=1, use_cpu=True, bf16=False, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = pytest.importorskip("datasets").Dataset.from_list(
        [{"input_ids": ids.tolist()} for ids in texts]
    )
    trainer = trl.SFTTrainer(model, options, train_dataset=rows, processing_class=numbers())
    trainer.train()
    with torch.no_grad():
        losses = [model(ids[None], labels=ids[None]).loss * (len(ids) - 1) for ids in texts]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(sum(losses) / 9), rel=1e-5)


def numbers():
    """Return a tokenizer whose words are the ids."""
    words = WordLevel({str(each): each for each in range(37)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="1", pad_token="0")


@pytest.mark.parametrize("block", ["paper", "modern"])
def test_the_trainer_learns_and_resumes_to_the_same_weights(block, tmp_path):
    first = trainer(fresh(scheme="dape-kerple", block=block), tmp_path / "first")
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    # The next token follows from the last one: an untrained model knows nothing of that.
    assert losses[0] == pytest.approx(math.log(37), rel=0.1) and losses[-1] < losses[0] / 3
    ids = tokens(1, 9)
    loaded = DapeForCausalLM.from_pretrained(tmp_path / "first" / "checkpoint-12")
    assert torch.equal(loaded(ids).logits, first.model.eval()(ids).logits)
    second = trainer(fresh(scheme="dape-kerple", block=block), tmp_path / "second")
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-6"))
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("way", ["a copy", "PEFT"])
def test_trl_compares_with_a_retrofitted_model_as_it_was_mounted(way, tmp_path):
    """At the start of DPO the model is its reference, and the loss ln 2."""
    trl = pytest.importorskip("trl", reason="TRL is in the environment of `make newest`")
    model = pretrained("llama")
    move(dape.retrofit(model, bias="kerple").adapters, 0.3)
    both = LoraConfig(target_modules=["q_proj"], modules_to_save=["adapter", "position_bias"])
    reference = {"ref_model": copy.deepcopy(model)} if way == "a copy" else {"peft_config": both}
    options = trl.DPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, logging_steps=1, use_cpu=True,
        bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = [{"prompt": "3", "chosen": "5", "rejected": "7"}] * 2
    rows = pytest.importorskip("datasets").Dataset.from_list(rows)
    trainer = trl.DPOTrainer(
        model, args=options, train_dataset=rows, processing_class=numbers(), **reference
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_trainer_smooths_the_labels_of_the_next_token(wrapped, tmp_path):
    model, ids = fresh(scheme="dape-kerple"), tokens(4, 12)
    move(model, 0.2)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.3).item()
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    arguments = TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.3, per_device_eval_batch_size=4, use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_trainer_keeps_a_column_of_documents(tmp_path):
    model, ids = fresh(scheme="dape-kerple"), tokens(2, 9)
    move(model, 0.2)
    number = torch.tensor([[0] * 4 + [1] * 5] * 2)
    expected = model(ids, labels=ids, seq_idx=number).loss.item()
    rows = {"input_ids": ids.tolist(), "labels": ids.tolist(), "seq_idx": number.tolist()}
    rows = pytest.importorskip("datasets").Dataset.from_dict(rows)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    assert Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"] == pytest.approx(
        expected, rel=1e-5
    )
    assert model(ids, labels=ids).loss.item() != pytest.approx(expected, rel=1e-2)
