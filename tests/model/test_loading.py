"""Loading, placement by Accelerate, and the text-generation pipeline."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import fresh, tokens
from pretrained import pretrained
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    pipeline,
)
from transformers.utils import logging

from dape.attention.select import BACKENDS
from dape.data.tokenizer import byte
from dape.errors import UserError
from dape.model import loading
from dape.model.loading import (
    check_base,
    check_capped,
    check_causal,
    fingerprint,
    load_causal,
    load_config,
)
from dape.runs import RunFolder
from dape.train.task import load

PIECES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
OFFLOADED = ("model.layers.1", "model.norm")


@pytest.mark.parametrize("scheme", ["dape-kerple", "dape3-fire", "transformer-xl"])
@pytest.mark.parametrize(
    "device_map",
    ["cpu", "auto", {name: "disk" if name in OFFLOADED else "cpu" for name in PIECES}],
    ids=["cpu", "auto", "half of it on disk"],
)
def test_placed_models_compute_the_same(device_map, scheme, tmp_path):
    model, ids = fresh(scheme=scheme), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "weights"
    )
    on_meta = {name for name, weight in placed.named_parameters() if weight.is_meta}
    assert bool(on_meta) == isinstance(device_map, dict)
    with torch.no_grad():
        assert torch.equal(placed(ids).logits, model(ids).logits)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(placed.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("scheme", ["dape-kerple", "fire", "t5", "talking-heads-alibi"])
@torch.no_grad()
def test_fused_kernels_leave_offloaded_parameters_to_the_modules(scheme, monkeypatch, tmp_path):
    model, ids = fresh(scheme=scheme), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    expected = model(ids).logits
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", offload_folder=tmp_path / "weights",
        device_map={name: "disk" if "layers" in name else "cpu" for name in PIECES},
    )  # fmt: skip
    # As on a GPU, `auto` asks the fused kernels first.
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"]._replace(gpu_only=False))
    assert torch.equal(placed(ids).logits, expected)
    placed.config.backend = "triton"
    with pytest.raises(UserError, match=r"a parameter of .* is on meta, and the query on cpu"):
        placed(ids)


@pytest.mark.parametrize("block", ["paper", "modern"])
def test_the_pipeline_continues_texts_as_generate_does(block, tmp_path):
    model, tokenizer = fresh(scheme="dape-kerple", vocab_size=257, block=block), byte()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts, options = ["a", "a longer text"], {"max_new_tokens": 6, "do_sample": False}
    generator = pipeline("text-generation", model=str(tmp_path))
    answers = generator(texts, batch_size=2, return_tensors=True, **options)
    for text, (answer,) in zip(texts, answers, strict=True):
        ids = torch.tensor([list(text.encode())])
        expected = model.generate(ids, **options, pad_token_id=256)[0, -6:].tolist()
        assert answer["generated_token_ids"][-6:] == expected


def test_loading_draws_no_number_and_keeps_the_verbosity(tmp_path):
    model = fresh()
    model.save_pretrained(tmp_path)
    logging.set_verbosity_info()
    try:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        loaded = load_causal(str(tmp_path))
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity_warning()
    assert torch.equal(torch.rand(3), expected)
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))


def test_code_beside_a_model_of_transformers_does_not_run(tmp_path):
    folder, canary = tmp_path / "model", tmp_path / "canary"
    model = pretrained("llama")
    model.config.auto_map = {"AutoModelForCausalLM": "code.Model"}
    model.save_pretrained(folder)
    (folder / "code.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    for config in ({}, {"config": loading.load_config(str(folder))}):
        assert type(load_causal(str(folder), **config)) is type(model)
    assert not canary.exists()


@pytest.mark.parametrize("cap", [0.5, None])
@torch.no_grad()
def test_a_cap_of_a_changed_configuration_is_computed(cap, tmp_path):
    model, ids = pretrained("gemma2", torch.float64), tokens(2, 9)
    model.config.attn_logit_softcapping = None if cap else 0.5
    model.save_pretrained(tmp_path)
    config = loading.load_config(str(tmp_path), attn_logit_softcapping=cap)
    loaded = load_causal(str(tmp_path), config=config, dtype=torch.float64)
    found = []
    for each in (0.5, None):
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = each
        found.append(model(ids).logits)
    assert (found[0] - found[1]).abs().max() > 1e-3
    expected = found[0] if cap else found[1]
    assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-5)  # angles are float32
    # sdpa in transformers 5.17, and eager in 5.24
    usual = AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation
    assert loaded.config._attn_implementation == ("eager" if cap else usual)
    other = load_causal(str(tmp_path), config=config, attn_implementation=usual)
    assert other.config._attn_implementation == usual


@pytest.mark.parametrize("name", ["attn_logit_softcapping", None])
def test_a_cap_is_left_out_by_one_attention_alone(name):
    config = Gemma3Config(text_config={name: 0.5} if name else {})
    model = nn.Module()
    model.config = config
    for attention in ("eager", "flex_attention", "sdpa"):
        config.get_text_config()._attn_implementation = attention
        if name and attention == "sdpa":
            with pytest.raises(UserError, match=r"^it leaves out attn_logit_softcapping=0.5"):
                check_capped(model, "it")
        else:
            check_capped(model, "it")


class Reads(nn.Module):
    """Logits 1000 of the token itself, and `weight` in one of them of a token `ahead`."""

    def __init__(self, ahead, weight):
        super().__init__()
        self.ahead, self.weight = ahead, weight

    def forward(self, input_ids, use_cache):
        logits = 1000 * nn.functional.one_hot(input_ids, 5).float()
        read = slice(0, max(input_ids.shape[1] - self.ahead, 0))
        logits[:, read, 4] += self.weight * input_ids[:, self.ahead :].float()
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_a_single_later_token_in_a_single_logit_is_noticed(ahead, weight):
    with pytest.raises(UserError, match=r"it \(Reads\) reads later tokens"):
        check_causal(Reads(ahead, weight), "it")


@pytest.mark.parametrize(("ahead", "weight"), [(0, 1.0), (1, 0.1)])
def test_rounding_is_no_later_token(ahead, weight):
    """A part in 10,000 of the logits is that of products in another order."""
    check_causal(Reads(ahead, weight), "it")


def test_a_fingerprint_is_of_names_and_of_the_first_numbers_in_bfloat16():
    model = nn.Module()
    model.b = nn.Parameter(torch.randn(9, 11))
    model.a = nn.Parameter(torch.randn(5) * 1e-6)
    expected = hashlib.sha256()
    for name in ("a", "b"):
        bits = getattr(model, name).detach().numpy().ravel()[:64].view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to the nearest, or the even one
        expected.update(name.encode() + rounded.astype(np.uint16).tobytes())
    assert fingerprint(model) == expected.hexdigest()[:16]


def test_a_run_without_a_fingerprint_keeps_its_base(tmp_path):
    model, run = fresh(), RunFolder(tmp_path)
    run.update_record({"ended": None})
    assert check_base(model, "base", run) == fingerprint(model)
    run.update_record({"base_weights": "0" * 16})
    with pytest.raises(UserError, match="the weights of base changed since the training of"):
        check_base(model, "base", run)


@pytest.mark.parametrize("error", [AttributeError, KeyError, RecursionError, TypeError])
def test_a_configuration_on_which_transformers_ends_is_one_line(error, monkeypatch):
    def ends(*_, **__):
        raise error("a\nreason")

    monkeypatch.setattr(loading, "fetch", ends)
    with pytest.raises(
        UserError, match=r"config.json of here is not a conf.*reason.* save"
    ) as line:
        loading.load_config("here")
    assert "\n" not in str(line.value)


@pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError, RuntimeError])
def test_files_on_which_transformers_ends_are_one_line(error, monkeypatch):
    def ends(*_, **__):
        raise error("reason")

    monkeypatch.setattr(loading, "fetch", ends)
    with pytest.raises(UserError, match=r"of here cannot be read.*reason") as line:
        load_causal("here", config=fresh().config)
    assert "\n" not in str(line.value)


def test_too_little_memory_for_weights_is_no_damage(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(loading, "fetch", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_causal("here", config=fresh().config)


SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
KINDS = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "beta_fast": 8.0}
CONFIGURATIONS = {
    "gpt-neox": lambda: GPTNeoXConfig(**SMALL, rotary_pct=0.5),
    "llama": lambda: LlamaConfig(**SMALL, rope_parameters=YARN),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, layer_types=KINDS
    ),
}


def changed(name, rotation, folder, key="rope_parameters"):
    """Return the saved model of a configuration, loaded with a changed rotation."""
    AutoModelForCausalLM.from_config(CONFIGURATIONS[name]()).save_pretrained(folder)
    return load(str(folder), {key: rotation})


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_changed_rotation_turns_the_part_of_a_head_that_the_model_turns(key, tmp_path):
    model = changed("gpt-neox", {"rope_type": "linear", "factor": 4.0}, tmp_path, key)
    expected = torch.tensor([1.0, 10_000**-0.5]) / 4
    assert_close(model.gpt_neox.rotary_emb.inv_freq, expected)


def test_two_names_of_one_changed_rotation_are_refused():
    given = {"rope_parameters": {"factor": 2.0}, "rope_scaling": {"factor": 4.0}}
    with pytest.raises(UserError, match=r"of here are two names .*; give rope_parameters alone"):
        load_config("here", **given)


def test_a_changed_rotation_keeps_base_and_kinds_of_layers(tmp_path):
    rotation = {"full_attention": {"rope_type": "linear", "factor": 4.0}}
    turn, powers = changed("gemma3", rotation, tmp_path).model.rotary_emb, torch.arange(4) / -4
    assert_close(turn.full_attention_inv_freq, 1_000_000**powers / 4)
    assert_close(turn.sliding_attention_inv_freq, 10_000**powers)


def test_a_changed_rotation_keeps_all_else_within_its_type_alone(tmp_path):
    turn = changed("llama", {"factor": 2.0}, tmp_path).config.rope_parameters
    assert turn == {**YARN, "factor": 2.0, "original_max_position_embeddings": 64}
    turn = changed("llama", {"rope_type": "linear", "factor": 2.0}, tmp_path).config.rope_parameters
    assert turn == {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "rotation", "words"),
    [
        ("llama", {"beta_fsat": 2.0}, "unknown key in rope_parameters of .*; did you mean 'beta_f"),
        ("llama", {"rope_type": "yran"}, "unknown rope_type 'yran'; did you mean 'yarn'"),
        ("llama", {"rope_type": 3}, "unknown rope_type '3'"),
        ("llama", {"rope_type": "linear"}, "rope_parameters of .*: Missing .*'factor'"),
        ("llama", 4.0, "rope_parameters of .*: 4.0 must map names to values"),
        ("gemma3", {"factor": 4.0}, "unknown kind of layer in .* 'factor' .known: full_attention,"),
        ("gemma3", {"full_attention": 4.0}, "rope_parameters of .*: 4.0 must map names"),
    ],
)
def test_a_changed_rotation_that_does_not_fit_is_one_line(name, rotation, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        changed(name, rotation, tmp_path)
    assert "\n" not in str(error.value)
