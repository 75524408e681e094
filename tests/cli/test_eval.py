"""`dape eval` on small run folders, against losses that the models themselves report."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml

from dape.cli.options import lengths
from dape.data.shards import Corpus
from dape.model.modeling import DapeForCausalLM
from folders import dape, make_run, prepare, refused


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("made")
    for scheme in ("kerple", "dape-kerple"):
        for seed in (0, 1):
            make_run(folder / f"{scheme}-{seed}", corpus, scheme, seed)
    return folder


@pytest.fixture
def runs(tmp_path, made):
    shutil.copytree(made, tmp_path / "runs")
    names = ("kerple-0", "kerple-1", "dape-kerple-0", "dape-kerple-1")
    return [tmp_path / "runs" / name for name in names]


def evaluation(run, name="last"):
    return json.loads((run / "evaluation" / f"{name}.json").read_text())


def loss_of_the_last(run, corpus, document, stop, length, scored):
    """Return what the model itself says of its loss on the tokens [stop - scored, stop)."""
    model = DapeForCausalLM.from_pretrained(run / "model").eval()
    tokens = torch.from_numpy(Corpus(corpus).split("test").document(document))[None, :stop]
    tokens = tokens[:, -length - 1 :]
    labels = tokens.clone()
    labels[:, :-scored] = -100
    with torch.no_grad():
        return model(input_ids=tokens, labels=labels).loss.item()


def test_every_model_and_length_is_scored_on_the_same_tokens(runs, corpus, capsys):
    assert not dape("eval", *runs, "--lengths", "16,32,64", "--documents", 2, "--blocks", 2)
    files = [evaluation(run) for run in runs]
    assert all(each["targets"] == files[0]["targets"] for each in files)
    targets = files[0]["targets"]
    part = Corpus(corpus).split("test")
    assert len(targets["documents"]) == 2
    assert all(part.document_lengths[number] > 65 for number in targets["documents"])
    for run, each in zip(runs, files, strict=True):
        for measurement in each["measurements"]:
            for number, tokens, loss in zip(
                targets["documents"], targets["tokens"], measurement["document_losses"], strict=True
            ):
                blocks = min(2, (part.document_lengths[number] - 1 - 65) // 64 + 1)
                assert tokens == 16 * blocks
                last = (part.document_lengths[number] - 1 - 65) // 64
                places = sorted({0, last})
                expected = [
                    loss_of_the_last(run, corpus, number, 65 + 64 * n, measurement["length"], 16)
                    for n in places
                ]
                assert loss == pytest.approx(np.mean(expected), rel=1e-5)
    table = capsys.readouterr().out
    assert "kerple" in table and "dape-kerple against kerple" in table and "16*" in table


def test_bytes_are_those_of_the_scored_text(runs, corpus):
    dape("eval", runs[0], "--lengths", "8,64", "--protocol", "non_overlapping")
    targets = evaluation(runs[0], "non_overlapping")["targets"]
    assert targets["bytes"] == targets["tokens"]  # a token of the byte tokenizer is a byte


def test_the_file_tells_where_its_numbers_come_from(runs, corpus, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["something", "else"])
    dape("eval", runs[0], "--lengths", "16", "--seed", "3", "--split", "test")
    content = evaluation(runs[0])
    assert (
        content["provenance"]["command"]
        == f"dape eval {runs[0]} --lengths 16 --seed 3 --split test"
    )
    assert content["provenance"]["versions"]["torch"] == torch.__version__
    assert content["provenance"]["device"].startswith("cpu")
    assert content["provenance"]["seed"] == 3
    assert content["targets"]["data"] == Corpus(corpus).checksum
    assert (content["scheme"], content["train_length"], content["seed"]) == ("kerple", 16, 0)


def test_sliding_has_a_file_of_its_own(runs):
    dape("eval", runs[0], "--lengths", "16,32", "--protocol", "sliding", "--stride", 8)
    assert evaluation(runs[0], "sliding-8")["targets"]["block"] == 8


def test_lengths_reach_sixteen_times_the_training_length_by_default(runs, capsys):
    message = refused(capsys, "eval", runs[0])
    assert "length 256: no document has the required 257 tokens" in message


def test_the_end_of_text_is_not_text_to_score(runs, corpus, capsys):
    longest = max(len(file.read_bytes()) for file in (corpus.parent / "text/test").iterdir())
    message = refused(capsys, "eval", runs[0], "--lengths", longest)
    assert f"the longest of 5 has {longest};" in message
    assert not dape("eval", runs[0], "--lengths", longest - 1)


def test_a_plain_model_folder_needs_a_corpus_and_then_works(runs, corpus, capsys):
    model = runs[0] / "model"
    assert "give --data" in refused(capsys, "eval", model, "--lengths", 16)
    dape("eval", runs[0], "--lengths", 16)
    assert not dape("eval", model, "--lengths", 16, "--data", corpus)
    assert evaluation(model)["measurements"] == evaluation(runs[0])["measurements"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128", (128,)),
        ("512,128,512", (128, 512)),
        ("128,...,1024", (128, 256, 512, 1024)),
        ("100,...,500,600", (100, 200, 400, 500, 600)),
    ],
)
def test_lengths_are_listed_or_doubled(text, expected):
    assert lengths(text) == expected


@pytest.mark.parametrize("text", ["", "a", "16,", "...,16", "16,...", "0,16", "-4"])
def test_lengths_that_mean_nothing_are_refused(text, capsys, runs):
    assert "--lengths" in refused(capsys, "eval", runs[0], f"--lengths={text}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "16", "--stride", "4"], "protocol last has no stride"),
        (["--lengths", "16", "--protocol", "lats"], "--protocol"),
        (["--lengths", "16", "--lenghts", "32"], "did you mean '--lengths'"),
        (["--lengths", "16", "--documents", "0"], "--documents 0: must be at least 1"),
        (["--lengths", "16", "--device", "cdua"], "--device cdua"),
        (["--lengths", "16", "--split", "dev"], "--split"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(runs, capsys, words, message):
    assert message in refused(capsys, "eval", runs[0], *words)


def test_no_run_and_no_model_are_refused(tmp_path, capsys):
    assert "no model given: name a run or a model" in refused(capsys, "eval")
    assert f"no model in {tmp_path}" in refused(capsys, "eval", tmp_path)


def test_different_corpora_are_compared_by_bits_per_byte_only(tmp_path, runs, capsys):
    other = make_run(tmp_path / "other", prepare(tmp_path / "more", seed=1), "alibi")
    message = refused(capsys, "eval", runs[0], other, "--lengths", 16)
    assert "perplexity cannot be compared" in message and "--metric bits_per_byte" in message
    assert not dape("eval", runs[0], other, "--lengths", 16, "--metric", "bits_per_byte")
    table = capsys.readouterr().out
    shown = [
        f"{evaluation(run)['measurements'][0]['bits_per_byte']:.4f}" for run in (runs[0], other)
    ]
    assert all(value in table for value in shown)
    assert "against" not in table


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path, runs, capsys):
    larger = tmp_path / "tokenizer"
    tokenizer = Corpus(yaml.safe_load((runs[0] / "config.yaml").read_text())["data"]).tokenizer()
    tokenizer.add_tokens(["abcd"])
    tokenizer.save_pretrained(larger)
    corpus = prepare(tmp_path / "more", tokenizer=str(larger))
    message = refused(capsys, "eval", runs[0], "--lengths", 16, "--data", corpus)
    assert "token ids up to 257" in message
    config = json.loads((runs[0] / "model" / "config.json").read_text())
    (runs[0] / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    message = refused(capsys, "eval", runs[0], "--lengths", 16, "--data", corpus)
    assert "not prepared with the tokenizer of" in message and "--tokenizer" in message


def test_a_length_that_a_model_refuses_stops_neither_its_others_nor_the_next_run(
    tmp_path, runs, corpus, capsys
):
    learned = [make_run(tmp_path / f"learned-{seed}", corpus, "learned", seed) for seed in (0, 1)]
    assert not dape("eval", *learned, runs[0], "--lengths", "8,16,32,64")
    shown = capsys.readouterr()
    reasons = {
        str(n): f"position {n - 1} is outside the learned embedding, whose table ends at "
        "train_length=16: give fewer tokens, train at a greater train_length, or take a scheme "
        "without a table, such as dape-kerple"
        for n in (32, 64)
    }
    for run in learned:
        content = evaluation(run)
        assert [each["length"] for each in content["measurements"]] == [8, 16]
        assert content["refused"] == reasons
        assert f"{run}  length 32  refused: {reasons['32']}\n" in shown.err
    assert [each["length"] for each in evaluation(runs[0])["measurements"]] == [8, 16, 32, 64]
    (row,) = (line for line in shown.out.splitlines() if line.split()[:2] == ["learned", "2"])
    assert row.split()[-2:] == ["—", "—"] and "—" not in row.split()[:4]
    told = " ".join(shown.out.split())
    assert f"— learned refused 32, 64 tokens: {reasons['32']}." in told
    out = tmp_path / "report.html"
    assert not dape("plot", *learned, runs[0], "--out", out)
    assert "— learned refused 32, 64 tokens" in out.read_text(encoding="utf-8")


def test_running_out_of_memory_is_no_refusal_but_ends_the_command(runs, capsys, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(DapeForCausalLM, "forward", exhausted)
    assert dape("eval", runs[0], "--lengths", "16,32") == 2
    shown = capsys.readouterr().err
    assert "out of memory at length 16 with 10 windows" in shown and "--batch-tokens" in shown
    assert "refused" not in shown
    assert not (runs[0] / "evaluation").exists()


def test_a_failed_evaluation_leaves_the_old_file(runs, capsys):
    dape("eval", runs[0], "--lengths", 16)
    before = evaluation(runs[0])
    capsys.readouterr()
    shutil.rmtree(runs[1] / "model")
    refused(capsys, "eval", runs[0], runs[1], "--lengths", 32)
    assert evaluation(runs[0]) == before


def test_a_run_that_is_given_twice_is_measured_and_counted_once(runs, tmp_path, capsys):
    assert not dape("eval", runs[0], runs[0], runs[1], "--lengths", 16)
    note = f"{runs[0]} is given more than once, and counted once\n"
    assert capsys.readouterr().err.startswith(note)
    words = ("plot", runs[0], runs[1], runs[0], "--out", tmp_path / "table.md")
    assert not dape(*words)
    assert capsys.readouterr().err == note
    assert "| kerple | 2 | " in (tmp_path / "table.md").read_text()


def test_a_killed_command_goes_on_where_it_was(runs, capsys, monkeypatch):
    """The second length is reached only by the second command."""
    words = ("eval", *runs[:2], "--lengths", "16,32")
    forward = DapeForCausalLM.forward

    def killed_at_32(self, input_ids, **options):
        if input_ids.shape[1] == 32:
            raise KeyboardInterrupt
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(DapeForCausalLM, "forward", killed_at_32)
    assert dape(*words) == 130
    monkeypatch.setattr(DapeForCausalLM, "forward", forward)
    capsys.readouterr()
    assert not dape(*words)
    told = [line.split()[2:4] for line in capsys.readouterr().err.splitlines()]
    assert told == [
        ["16", "measured"],
        ["32", "perplexity"],
        ["16", "perplexity"],
        ["32", "perplexity"],
    ]
    resumed = [evaluation(run)["measurements"] for run in runs[:2]]
    assert not dape(*words, "--again")
    assert [evaluation(run)["measurements"] for run in runs[:2]] == resumed


def test_results_of_models_that_cannot_be_written_go_elsewhere(runs, tmp_path, capsys):
    """A file lies where the folder of the results would be."""
    (runs[0] / "evaluation").write_text("in the way")
    line = refused(capsys, "eval", runs[0], "--lengths", 16)
    assert f"results cannot be written to {runs[0] / 'evaluation'}" in line and "--out" in line
    assert not dape("eval", runs[0], "--lengths", 16, "--out", tmp_path / "results")
    out = tmp_path / "results" / runs[0].name
    assert not dape("plot", out, "--out", tmp_path / "table.md")
    assert str(runs[0]) in (tmp_path / "table.md").read_text()
