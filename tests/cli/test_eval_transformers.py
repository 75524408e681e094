"""`dape eval` on models of transformers' own, made here: their own loss is the oracle."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from foreign import CONFIGS, ENDS, SHAPE, WIDE, evaluation, save
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, LlamaConfig

from dape.data.shards import Corpus
from folders import dape, learned_tokenizer, prepare, refused, spaced_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models"), CONFIGS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("corpus")
    return prepare(folder, tokenizer=made / "llama", sizes=[400, 900])


def own_loss(model, corpus, targets, length, begin=None):
    """Return what the model itself says of the last 8 tokens of the one window in a document."""
    losses = []
    for number in targets["documents"]:
        tokens = torch.from_numpy(Corpus(corpus).split("test").document(number))[None, : 64 + 1]
        tokens = tokens[:, -length - 1 :].clone()
        if begin is not None:
            tokens[:, 0] = begin
        labels = tokens.clone()
        labels[:, :-8] = -100
        with torch.no_grad():
            losses.append(model(input_ids=tokens, labels=labels).loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "longer"),
    [
        ("llama", {}),
        ("gpt_neox", {}),
        ("mpt", {"max_seq_len": 65}),
        ("gptj", {"n_positions": 65}),
        ("ctrl", {"n_positions": 65}),
    ],
)
def test_the_longest_position_of_a_config_limits_no_model_that_can_go_on(
    made, corpus, name, longer
):
    words = ("--lengths", "8,16,64", "--blocks", 1, "--data", corpus)
    assert not dape("eval", made / name, *words)
    content = evaluation(made / name)
    assert (content["scheme"], content["train_length"]) == (name, ENDS)
    assert content["refused"] == {} and content["seed"] is None
    model = AutoModelForCausalLM.from_pretrained(made / name, **longer).eval()
    for measurement in content["measurements"]:
        expected = own_loss(model, corpus, content["targets"], measurement["length"])
        assert measurement["document_losses"] == pytest.approx(expected, rel=1e-5)


def test_each_window_begins_as_the_model_s_texts_do_if_asked_for(made, corpus, capsys):
    words = ("--lengths", "8,16,64", "--blocks", 1, "--data", corpus, "--bos")
    assert not dape("eval", made / "llama", *words)
    content = evaluation(made / "llama")
    model = AutoModelForCausalLM.from_pretrained(made / "llama").eval()
    for measurement in content["measurements"]:
        given = (model, corpus, content["targets"], measurement["length"])
        assert measurement["document_losses"] == pytest.approx(own_loss(*given, 0), rel=1e-5)
        assert measurement["document_losses"] != pytest.approx(own_loss(*given), rel=1e-5)
    capsys.readouterr()
    assert not dape("plot", made / "llama", "--out", made / "table.md")
    assert "begins with the model's token for the beginning" in (made / "table.md").read_text()


def test_a_model_without_a_token_for_the_beginning_is_refused(tmp_path, corpus, capsys):
    config = LlamaConfig(**{**SHAPE, "bos_token_id": None}, **WIDE, intermediate_size=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    said = refused(capsys, "eval", tmp_path / "model", "--lengths", 8, "--data", corpus, "--bos")
    assert f"--bos: the configuration of {tmp_path / 'model'} has no bos_token_id" in said


@pytest.mark.parametrize(("name", "rows"), [("gpt2", ENDS), ("opt", ENDS + 2)])
def test_learned_positions_end_and_the_table_says_so(made, corpus, capsys, name, rows):
    folder = made / name
    assert not dape("eval", folder, "--lengths", "8,16,32", "--data", corpus, "--blocks", 1)
    content = evaluation(folder)
    assert [each["length"] for each in content["measurements"]] == [8, 16]
    reason = f"no learned position for row {31 + rows - ENDS}: the table has {rows} rows"
    assert content["refused"] == {"32": reason}
    told = " ".join(capsys.readouterr().out.split())
    assert f"— {name} refused 32 tokens: {reason}." in told


def test_a_corpus_of_another_tokenizer_is_refused_and_the_remedy_works(tmp_path, made, capsys):
    other = prepare(tmp_path / "bytes", sizes=[400])
    message = refused(capsys, "eval", made / "llama", "--lengths", 16, "--data", other)
    assert "not prepared with the tokenizer of" in message
    tokenizer = message.rpartition("--tokenizer ")[2]
    mended = prepare(tmp_path / "mended", tokenizer=tokenizer, sizes=[400])
    assert not dape("eval", made / "llama", "--lengths", 16, "--data", mended)


def test_models_of_different_tokenizers_meet_in_bits_per_byte(tmp_path, made):
    """On a text without accents, whose bytes are the characters that the tokens decode to."""
    shutil.copytree(made / "llama", tmp_path / "spaced")
    spaced_tokenizer().save_pretrained(tmp_path / "spaced")
    shutil.copytree(made / "llama", tmp_path / "joined")
    out = tmp_path / "table.md"
    for name in ("spaced", "joined"):
        model = tmp_path / name
        data = prepare(tmp_path / f"{name}-text", tokenizer=model, sizes=[300, 400], letters="ab ")
        words = ("--lengths", "16,64", "--blocks", 1, "--data", data)
        assert not dape("eval", model, *words)
        content, tokenizer = evaluation(model), Corpus(data).tokenizer()
        measured = content["measurements"][1]
        decoded = [
            (tokenizer.decode(document[:65]), tokenizer.decode(document[: 65 - 16]))
            for document in map(
                Corpus(data).split("test").document, content["targets"]["documents"]
            )
        ]
        characters = sum(len(whole) - len(before) for whole, before in decoded)
        nats = sum(16 * loss for loss in measured["document_losses"])
        assert characters > 32  # some tokens are more than a byte
        expected = nats / math.log(2) / characters
        assert measured["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    folders = (tmp_path / "spaced", tmp_path / "joined")
    assert not dape("plot", *folders, "--out", out, "--metric", "bits_per_byte")
    for folder in folders:
        (row,) = (
            line for line in out.read_text().splitlines() if f"({folder})" in line and "|" in line
        )
        shown = [f"{each['bits_per_byte']:.4f}" for each in evaluation(folder)["measurements"]]
        assert row.endswith(f"| {' | '.join(shown)} |")


def test_a_name_is_looked_up_in_the_cache_and_measured_as_the_folder_is(tmp_path, made, corpus):
    """The layout of the cache is the hub library's own; no network is there to ask."""
    repository = tmp_path / "hub" / "models--someone--small"
    shutil.copytree(made / "llama", repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    words = ["--lengths", "64", "--blocks", "1", "--data", str(corpus)]
    run = subprocess.run(
        [sys.executable, "-m", "dape", "eval", "someone/small", *words],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    dape("eval", made / "llama", *words)
    found = evaluation(tmp_path / "runs" / "someone" / "small")
    assert found["measurements"] == evaluation(made / "llama")["measurements"]


def test_a_name_nobody_knows_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("dape.data.hub.reachable", lambda: False)
    message = refused(capsys, "eval", "runs/tpyo", "--lengths", 16)
    assert "no model 'runs/tpyo': there is no such folder" in message
    assert "hub cannot be reached" in message


def test_tokenizers_that_normalise_text_count_the_bytes_of_what_they_read(tmp_path, made, capsys):
    """The text is decomposed, and the tokens stand for its composed form."""
    folder = shutil.copytree(made / "llama", tmp_path / "composing")
    tokenizer = learned_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(folder)
    letters = ("a", "b", "e\u0301", " ")
    data = prepare(tmp_path / "text", tokenizer=folder, sizes=[300, 400], letters=letters)
    assert not dape("eval", folder, "--lengths", "16,64", "--blocks", 1, "--data", data)
    content = evaluation(folder)
    document = Corpus(data).split("test").document
    for number, tokens, counted in zip(
        *(content["targets"][name] for name in ("documents", "tokens", "bytes")), strict=True
    ):
        whole, before = (
            tokenizer.decode(document(number)[:stop]).encode() for stop in (65, 65 - tokens)
        )
        assert "e\u0301".encode() not in whole and "\u00e9".encode() in whole
        assert counted == len(whole) - len(before)


def test_tokenizers_that_lose_text_leave_bits_per_byte_out(tmp_path, made, capsys):
    folder = shutil.copytree(made / "llama", tmp_path / "lower")
    tokenizer = learned_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)
    data = prepare(tmp_path / "text", tokenizer=folder, sizes=[300, 400])
    words = ("eval", folder, "--lengths", "16,64", "--data", data)
    assert not dape(*words)
    content = evaluation(folder)
    assert content["targets"]["bytes"] is None
    assert [each["bits_per_byte"] for each in content["measurements"]] == [None, None]
    capsys.readouterr()
    assert not dape(*words, "--metric", "bits_per_byte")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["llama", "1", "—", "—"] in rows
    for out in ("report.html", "table.md", "curve.png"):
        assert not dape("plot", folder, "--out", tmp_path / out)
        assert not dape("plot", folder, "--metric", "bits_per_byte", "--out", tmp_path / out)
