"""Fine-tuning of a pretrained model: what plain PyTorch does, with all but the adapters at rest."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import batch, losses, metrics, validation_loss
from torch.distributed.checkpoint import FileSystemReader
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import dape
from dape import strict
from dape.data.shards import Corpus, Windows
from dape.errors import UserError
from dape.evaluate import evaluate
from dape.model.loading import fingerprint
from dape.runs import RunFolder
from dape.train import loop
from dape.train.plan import check
from dape.train.recipe import Retrofit
from dape.train.run import finetune

CONFIG = {
    "vocab_size": 257, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
    return folder


def recipe(base, data, out, **changes):
    sections = {
        "data": data,
        "out": str(out),
        "model": {"base": str(base), "options": {"adapter": {"hidden": 8}}},
        "training": {"length": 16, "batch_size": 8, "steps": 6, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-1, "warmup": 0.0, "final": 1.0, "weight_decay": 0.0},
        "hardware": {"device": "cpu"},
        "tracking": {"log_every": 1, "validate_every": 4, "checkpoint_every": 3},
    }
    for name, value in changes.items():
        sections[name] = sections[name] | value if isinstance(value, dict) else value
    return strict.build(Retrofit, sections)


def run(settings):
    return finetune(settings.model.base, settings).path


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    return run(recipe(base, data, tmp_path_factory.mktemp("runs") / "whole"))


def plain_losses(model, parameters, data):
    """Return the losses of six steps of AdamW in plain PyTorch, with the seed of each step."""
    windows = Windows(Corpus(data).split("train"), 16, seed=0)
    optimizer = torch.optim.AdamW(parameters, lr=1e-1, betas=(0.9, 0.95), weight_decay=0)
    found = []
    for step in range(6):
        tokens = torch.from_numpy(batch(windows, step, 8))
        seed = np.random.SeedSequence([0, step + 1, 0]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def test_adapters_train_as_in_plain_pytorch_and_the_base_rests(finished, base, data):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    mounted = dape.retrofit(model, "dape", "kerple", options={"adapter": {"hidden": 8}})
    expected = plain_losses(model, list(mounted.adapters.parameters()), data)
    assert losses(finished) == pytest.approx(expected, rel=1e-5)
    assert abs(expected[-1] - expected[0]) > 1e-3
    saved = load_file(finished / "adapters" / "adapters.safetensors")
    for name, tensor in mounted.state().items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-4)
    own = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(own[name], value) for name, value in weights.items())


def test_checkpoints_hold_what_trains_alone(finished):
    (last,) = sorted((finished / "checkpoints").glob("step-00000006"))
    names = FileSystemReader(last).read_metadata().state_dict_metadata
    weights = {name for name in names if name.startswith("model.")}
    assert len(weights) == 2 * (4 + 2)
    assert all(".adapter." in name or ".position_bias." in name for name in weights)


def test_an_interrupted_run_goes_on_to_the_same_adapters(
    finished, base, data, tmp_path, monkeypatch
):
    settings = recipe(base, data, tmp_path / "run")

    def cut(session):
        for step, found in enumerate(updates(session), start=1):
            if step == 5:
                raise KeyboardInterrupt
            yield found

    updates = loop.updates
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "updates", cut)
        run(settings)
    assert not (tmp_path / "run" / "adapters").exists()
    run(settings)
    whole, resumed = (
        load_file(folder / "adapters" / "adapters.safetensors")
        for folder in (finished, settings.folder)
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_model_as_it_is_trains_whole_and_is_saved_whole(base, data, tmp_path):
    settings = recipe(
        base, data, tmp_path / "run", model={"adapter": None, "train": "all", "options": {}}
    )
    folder = run(settings)
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = plain_losses(model, list(model.parameters()), data)
    assert losses(folder) == pytest.approx(expected, rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)
    assert (folder / "model" / "tokenizer.json").is_file()


def test_adapters_of_a_base_that_changed_are_neither_trained_on_nor_measured(data, tmp_path):
    base = tmp_path / "base"
    for seed in (7, 8):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(tmp_path / str(seed))
    shutil.copytree(tmp_path / "7", base)
    folder = run(recipe(base, data, tmp_path / "run"))
    (before,) = evaluate(folder, lengths=[16])
    shutil.copytree(tmp_path / "8", base, dirs_exist_ok=True)
    words = f"the weights of {base} changed since the training of {folder} began; put the first"
    with pytest.raises(UserError, match=words):
        evaluate(folder, lengths=[16])
    shutil.rmtree(folder / "adapters")
    RunFolder(folder).update_record({"ended": None})
    with pytest.raises(UserError, match=words):
        run(recipe(base, data, folder))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "7", dtype=torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "7", dtype=torch.float32)
    assert (
        fingerprint(half) == fingerprint(whole) == RunFolder(folder).read_record()["base_weights"]
    )
    shutil.copytree(tmp_path / "7", base, dirs_exist_ok=True)
    (after,) = evaluate(run(recipe(base, data, folder)), lengths=[16])
    assert after.by_length == before.by_length


@pytest.mark.parametrize("every", [1, 4])
def test_dropout_of_the_base_is_on_in_every_step_whenever_the_run_validates(data, tmp_path, every):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    config = GPT2Config(vocab_size=257, **sizes, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(7)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    whole = {"adapter": None, "train": "all", "options": {}}
    often = {"validate_every": every}
    folder = run(recipe(tmp_path / "gpt2", data, tmp_path / "run", model=whole, tracking=often))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").train()
    expected = plain_losses(model, list(model.parameters()), data)
    assert losses(folder) == pytest.approx(expected, rel=1e-5)


def test_the_validation_loss_of_experts_is_the_cross_entropy_alone(data, tmp_path):
    """Where the configuration asks, the loss of transformers adds a loss of balance."""
    torch.manual_seed(7)
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    balance = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
    model = MixtralForCausalLM(MixtralConfig(**CONFIG, **experts, **balance))
    model.save_pretrained(tmp_path / "experts")
    changes = {"adapter": None, "train": "all", "options": {}}
    folder = run(recipe(tmp_path / "experts", data, tmp_path / "run", model=changes))
    saved = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert saved.config.output_router_logits
    (*_, last) = metrics(folder)
    expected = validation_loss(saved, Corpus(data), batches=8)
    assert last["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert last["loss"] > expected + 1.5, "the balance trains, and is about the number of choices"


def test_keys_of_the_configuration_change(data, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = dape.DapeConfig(scheme="rope", vocab_size=257, train_length=16, **sizes)
    dape.DapeForCausalLM(config).save_pretrained(tmp_path / "base" / "model")
    changes = {"adapter": None, "train": "q_proj", "options": {}, "config": {"scheme": "yarn"}}
    folder = run(recipe(tmp_path / "base", data, tmp_path / "run", model=changes))
    saved = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert isinstance(saved.model.layers[0].self_attn.rotation, dape.YaRN)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base" / "model").state_dict()
    moved = {name for name, value in saved.state_dict().items() if not value.equal(before[name])}
    assert moved == {f"model.layers.0.self_attn.q_proj.{kind}" for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"config": {"hiden_size": 8}}, "unknown key of the configuration of .* 'hiden_size'"),
        ({"adapter": None}, "nothing would train; name parts, or 'all'"),
        ({"train": "adapters,q_porj"}, "unknown part to train 'q_porj'; did you mean 'q_proj'"),
        ({"adapter": "dpae"}, "unknown adapter 'dpae'"),
    ],
)
def test_mistakes_are_found_before_a_step(base, data, tmp_path, model, words):
    with pytest.raises(UserError, match=words):
        run(recipe(base, data, tmp_path / "run", model=model))
    assert not (tmp_path / "run").exists()


def test_a_model_that_reads_later_tokens_is_not_trained(data, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(7)
    config = BertConfig(vocab_size=257, **sizes, intermediate_size=20, initializer_range=0.5)
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    whole = {"adapter": None, "train": "all", "options": {}}
    with pytest.raises(UserError, match="reads later tokens, and is no causal language model"):
        run(recipe(tmp_path / "bert", data, tmp_path / "run", model=whole))


def test_layouts_that_fine_tuning_does_not_have(base, data, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"hardware.compile='blocks': the blocks of pretrained"):
        check(recipe(base, data, tmp_path, hardware={"compile": True}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(recipe(base, data, tmp_path))
    with pytest.raises(UserError, match=r"hardware.strategy='fsdp': adapters are not sharded"):
        check(recipe(base, data, tmp_path, hardware={"strategy": "fsdp"}))
    with pytest.raises(UserError, match=r"hardware.context_parallel: devices cannot share"):
        check(recipe(base, data, tmp_path, hardware={"context_parallel": 2}))
