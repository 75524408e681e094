"""`dape export`: the folder in a fresh process, the checkpoint's own bytes, and the card."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dape.data.shards import Corpus
from dape.model.modeling import DapeForCausalLM
from dape.train import restore
from folders import dape, prepare, refused

STEPS, BATCH, LENGTH = 6, 4, 16
FRESH = """
import sys, torch, dape
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokens = tokenizer("bad caf\u00e9", return_tensors="pt")
with torch.no_grad():
    logits = model(**tokens).logits
text = model.generate(**tokens, max_new_tokens=5, do_sample=False)
torch.save((tokens.input_ids, logits, text, tokenizer.decode(tokens.input_ids[0])), sys.argv[2])
"""


def train(folder, **model):
    """Return the folder of a run that has ended, with its checkpoints at steps 4 and 6."""
    data = prepare(folder, sizes=[600, 700])
    recipe = {
        "out": str(folder / "run"),
        "data": str(data),
        "model": {
            "scheme": "dape-kerple",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            **model,
        },
        "training": {
            "length": LENGTH,
            "batch_size": BATCH,
            "steps": STEPS,
            "precision": "fp32",
        },
        "hardware": {"device": "cpu"},
        "tracking": {
            "log_every": 1,
            "checkpoint_every": 2,
            "validate_every": 2,
            "validation_batches": 1,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert not dape("train", folder / "recipe.yaml")
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def interrupt(run):
    """Leave of a run what a process leaves that was killed after step 4."""
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "ended": None}))


def fresh(*words, cwd=None):
    process = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_a_fresh_process_finds_the_same_logits_the_tokenizer_and_generates(run, tmp_path, capsys):
    out = tmp_path / "hub" / "small"
    out.parent.mkdir()
    assert not dape("export", run, "--out", out)
    assert f"wrote {out}, the model after 6 steps" in capsys.readouterr().out
    fresh("-c", FRESH, out, tmp_path / "found.pt")
    tokens, logits, text, decoded = torch.load(tmp_path / "found.pt")
    assert tokens[0].tolist() == list("bad caf\u00e9".encode())
    assert decoded == "bad caf\u00e9"
    model = DapeForCausalLM.from_pretrained(run / "model").eval()
    with torch.no_grad():
        assert torch.equal(logits, model(input_ids=tokens).logits)
        for _ in range(5):
            following = model(input_ids=tokens).logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, following], 1)
    assert text.tolist() == tokens.tolist()


def test_the_code_on_the_card_runs(run, tmp_path):
    dape("export", run, "--out", tmp_path / "small")
    (code,) = re.findall(
        r"```python\n(.*?)```", (tmp_path / "small" / "README.md").read_text(), re.S
    )
    assert len(code.splitlines()) == 3
    assert fresh("-c", code, cwd=tmp_path).startswith("The")


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_that_has_not_ended_gives_the_weights_of_its_latest_checkpoint(tmp_path, tied):
    run = train(tmp_path, tie_word_embeddings=tied)
    finished = load_file(run / "model" / "model.safetensors")
    interrupt(run)
    assert not dape("export", run, "--out", tmp_path / "out")
    dcp_to_torch_save(run / "checkpoints" / "step-00000004", tmp_path / "saved.pt")
    expected = torch.load(tmp_path / "saved.pt")["model"]
    found = DapeForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(finished[name], expected[name]) for name in finished)
    assert ("lm_head.weight" in finished) != tied


def meanwhile(act, monkeypatch):
    """Let a training `act` while the export loads a checkpoint for the first time."""
    load = restore.load_weights

    def late(path, model):
        monkeypatch.undo()
        act()
        return load(path, model)

    monkeypatch.setattr(restore, "load_weights", late)


def test_checkpoints_may_come_and_go_while_one_is_read(run, tmp_path, monkeypatch, capsys):
    """A run in training saved step 6, and dropped both checkpoints that were there."""
    checkpoints = run / "checkpoints"
    newer = shutil.copytree(checkpoints / "step-00000006", tmp_path / "step-00000006")
    interrupt(run)

    def act():
        shutil.rmtree(checkpoints / "step-00000004")
        newer.rename(checkpoints / newer.name)

    meanwhile(act, monkeypatch)
    assert not dape("export", run, "--out", tmp_path / "out")
    assert "the model after 6 steps" in capsys.readouterr().out


def test_weights_of_checkpoints_that_are_gone_are_not_made_up(run, tmp_path, monkeypatch, capsys):
    interrupt(run)
    draw = restore.draw

    def late(*given):
        shutil.rmtree(run / "checkpoints")
        return draw(*given)

    monkeypatch.setattr(restore, "draw", late)
    assert "has no checkpoint yet" in refused(capsys, "export", run, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def card(folder):
    return ModelCard.load(folder / "README.md")


def rows(text):
    return dict(re.findall(r"^\| ([a-z][^|]*) \| ([^|]*) \|$", text, re.M))


def test_the_card_holds_what_was_trained_and_measured(run, tmp_path):
    words = ("--lengths", "16,64", "--documents", "1")
    dape("eval", run, *words)
    dape("eval", run, *words, "--protocol", "non_overlapping", "--split", "test")
    dape("eval", "retrieval", run, "--lengths", "300", "--depths", "0.5", "--trials", 1)
    dape("export", run, "--out", tmp_path / "small")
    made, record = card(tmp_path / "small"), json.loads((run / "run.json").read_text())
    data = made.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["tags"] == ["dape", "dape-kerple"]
    expected = {}
    for name in ("last", "non_overlapping"):
        content = json.loads((run / "evaluation" / f"{name}.json").read_text())
        for each in content["measurements"]:
            expected[f"perplexity at {each['length']} tokens, protocol {name}"] = each["perplexity"]
            assert f"{each['perplexity']:.2f}" in made.text
            assert f"{each['bits_per_byte']:.4f}" in made.text
        assert content["provenance"]["command"] in made.text
    found = {each.metric_name: each.metric_value for each in made.data.eval_results}
    assert found == {name: pytest.approx(value, abs=5e-5) for name, value in expected.items()}
    table = rows(made.text)
    assert table["tokens seen"] == "384 (6 steps of 4 sequences of 16)"
    assert table["checksum of the data"] == Corpus(record["data"]["path"]).checksum
    data = record["data"]["path"]
    assert table["data"] == f"{data}, from {Path(data).parent / 'text'}"
    assert table["hardware"] == f"1 x {record['device']}"
    assert table["validation loss"] == f"{record['validation_loss']:.4f} nats a token"
    model = DapeForCausalLM.from_pretrained(run / "model")
    parameters = sum(each.numel() for each in model.parameters())
    assert table["parameters"].startswith(f"{parameters:,}, with ")
    assert f"model of {parameters:,} parameters, trained on sequences of 16 tokens" in made.text
    assert (run / "config.yaml").read_text().strip() in made.text
    assert "Passkey: whole number right" in made.text
    assert "not finished" not in made.text


def test_what_was_not_measured_is_not_on_the_card(run, tmp_path):
    dape("export", run, "--out", tmp_path / "plain")
    plain = card(tmp_path / "plain")
    assert plain.data.eval_results is None and "model-index" not in plain.content
    assert "Measured" not in plain.text and "perplexity" not in plain.text.lower()
    (run / "run.json").write_text(json.dumps({"ended": "then", "scheme": "dape-kerple"}))
    (run / "metrics.jsonl").unlink()
    dape("export", run, "--out", tmp_path / "bare")
    bare = card(tmp_path / "bare").text
    assert rows(bare).keys() == {"tokens seen", "parameters", "precision", "seed"}
    assert "None" not in bare and "{" not in bare.replace("scheme_options: {}", "")


def test_the_use_of_far_text_is_no_perplexity_of_the_card(run, tmp_path):
    dape("eval", "context", run, "--lengths", "16,32", "--documents", 1)
    assert (run / "evaluation" / "context.json").is_file()
    dape("export", run, "--out", tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.eval_results is None


def test_the_card_of_a_checkpoint_says_so_and_knows_no_later_number(run, tmp_path):
    dape("eval", run, "--lengths", "16", "--documents", "1")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    interrupt(run)
    dape("export", run, "--out", tmp_path / "out")
    text = card(tmp_path / "out").text
    assert "The run is not finished. The weights are from step 4 of 6." in text
    assert "Measured" not in text
    (fourth,) = (step for step in steps if step["step"] == 4)
    table = rows(text)
    assert table["tokens seen"] == "256 (4 steps of 4 sequences of 16)"
    assert table["training loss of the last step"] == f"{fourth['loss']:.4f} nats a token"
    assert table["validation loss"] == f"{fourth['validation_loss']:.4f} nats a token"


def test_mistakes_are_one_line_with_the_remedy(run, tmp_path, capsys):
    out = tmp_path / "out"
    message = refused(capsys, "export", tmp_path, "--out", out)
    assert f"no run in {tmp_path}: no config.yaml" in message
    message = refused(capsys, "export", run, "--out", run)
    assert "exists and is not empty; give another" in message
    assert "--out" in refused(capsys, "export", run)
    interrupt(run)
    record = json.loads((run / "run.json").read_text())
    data = {**record["data"], "checksum": "0" * 64}
    (run / "run.json").write_text(json.dumps({**record, "data": data}))
    assert "was trained on other data" in refused(capsys, "export", run, "--out", out)
    message = refused(capsys, "eval", run, "--lengths", 16)
    assert f"`dape export {run} --out DIR` makes a model of the latest checkpoint" in message
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet" in refused(capsys, "export", run, "--out", out)
    assert not out.exists()


def test_an_empty_folder_is_taken_and_a_part_of_before_is_no_trouble(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    out.with_name("out.partial").mkdir()
    (tmp_path / "out.partial" / "junk").touch()
    assert not dape("export", run, "--out", out)
    assert (out / "model.safetensors").is_file() and not (out / "junk").exists()
    assert not (tmp_path / "out.partial").exists()
