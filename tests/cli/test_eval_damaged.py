"""`dape eval` on models whose files are missing, do not fit, are damaged or are hostile."""

import json
import os
import shutil

import pytest
import torch
from foreign import evaluation, save
from safetensors.torch import load_file, save_file

from dape.errors import UserError
from dape.evaluate import evaluate, evaluate_context, evaluate_retrieval
from dape.model.configuration import DapeConfig
from dape.model.modeling import DapeForCausalLM
from folders import dape, prepare, refused


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models"), ("llama", "gpt2", "gpt_neox"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("corpus")
    return prepare(folder, tokenizer=made / "llama", sizes=[400, 900])


def test_a_model_without_weights_is_one_line(tmp_path, made, corpus, capsys):
    shutil.copytree(made / "llama", tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    assert dape("eval", tmp_path / "empty", "--lengths", 16, "--data", corpus) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {tmp_path / 'empty'} cannot be loaded" in last


def without(folder, *endings, **more):
    """Take weights out of a saved model, and put others in."""
    tensors = load_file(folder / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if not name.endswith(endings or "?")}
    save_file(kept | more, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "endings", "more", "message"),
    [
        ("llama", ("lm_head.weight",), {}, "the file misses lm_head.weight;"),
        (
            "llama",
            ("q_proj.weight",),
            {},
            "the file misses model.layers.0.self_attn.q_proj.weight;",
        ),
        ("gpt2", (), {"strange": torch.zeros(2)}, "the file has strange without a place;"),
        ("gpt_neox", ("mlp.dense_h_to_4h.weight", "bias"), {}, "and "),
    ],
)
def test_weights_that_are_missing_or_left_over_are_refused_unless_meant(
    tmp_path, made, corpus, capsys, name, endings, more, message
):
    shutil.copytree(made / name, tmp_path / name)
    without(tmp_path / name, *endings, **more)
    words = ("eval", tmp_path / name, "--lengths", 16, "--data", corpus)
    line = refused(capsys, *words)
    assert f"the weights in {tmp_path / name} do not fit the configuration" in line
    assert message in line and "--partial-weights" in line
    assert not dape(*words, "--partial-weights")
    assert evaluation(tmp_path / name)["measurements"]


@pytest.mark.parametrize("measure", [evaluate, evaluate_context, evaluate_retrieval])
def test_a_function_refuses_missing_weights_as_the_command_does(tmp_path, made, corpus, measure):
    shutil.copytree(made / "llama", tmp_path / "llama")
    without(tmp_path / "llama", "lm_head.weight")
    with pytest.raises(UserError, match="the file misses lm_head"):
        measure(tmp_path / "llama", corpus=corpus, lengths=[300])


def test_missing_weights_are_drawn_alike_in_every_process(tmp_path, made, corpus):
    """Lengths of an interrupted measurement, and parts of a spread window, are of one model."""
    shutil.copytree(made / "llama", tmp_path / "llama")
    without(tmp_path / "llama", "lm_head.weight")
    words = ("eval", tmp_path / "llama", "--data", corpus, "--partial-weights", "--again")
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        assert not dape(*words, "--lengths", 16)
        assert torch.equal(torch.random.get_rng_state(), before)
        losses.append(evaluation(tmp_path / "llama")["measurements"][0]["loss"])
    assert losses[0] == losses[1]


def test_weights_of_another_scheme_are_refused(tmp_path, corpus, capsys):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for scheme in ("kerple", "dape-kerple"):
        config = DapeConfig(scheme=scheme, vocab_size=300, train_length=16, **sizes)
        DapeForCausalLM(config).save_pretrained(tmp_path / scheme)
    for given, saved in (("kerple", "dape-kerple"), ("dape-kerple", "kerple")):
        shutil.copytree(tmp_path / given, tmp_path / f"{given}-mixed")
        weights = (tmp_path / saved / "model.safetensors").read_bytes()
        (tmp_path / f"{given}-mixed" / "model.safetensors").write_bytes(weights)
        mixed = tmp_path / f"{given}-mixed"
        line = refused(capsys, "eval", mixed, "--lengths", 16, "--data", corpus)
        assert "adapter" in line and ("has" if given == "kerple" else "misses") in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"garbage"),
        ("model.safetensors", b"\x10" + bytes(30)),
        ("config.json", b""),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"null"),
        ("config.json", b'{"model_type": "llama", "vocab_size": "a"}'),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", b'{"version": null}'),
        ("tokenizer_config.json", b"{"),
        ("generation_config.json", b"null"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, made, corpus, capsys, name, content):
    shutil.copytree(made / "llama", tmp_path / "llama")
    (tmp_path / "llama" / name).write_bytes(content)
    line = refused(capsys, "eval", tmp_path / "llama", "--lengths", 16, "--data", corpus)
    assert str(tmp_path / "llama") in line


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def test_weights_and_code_of_someone_else_do_not_run(tmp_path, made, corpus, capsys):
    folder, canary = tmp_path / "llama", tmp_path / "canary"
    shutil.copytree(made / "llama", folder)
    (folder / "model.safetensors").unlink()
    torch.save({"a": Code(canary)}, folder / "pytorch_model.bin")
    words = ("eval", folder, "--lengths", 16, "--data", corpus)
    assert f"the weights of {folder} cannot be read" in refused(capsys, *words)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    assert "custom code" in refused(capsys, *words)
    assert not canary.exists()
