"""`dape plot learned`: what its files hold, and what it refuses."""

import json

import numpy as np
import pytest
import torch

from dape.data.shards import Corpus
from dape.evaluate.capture import capture
from dape.evaluate.heads import describe
from dape.evaluate.learned import load
from dape.figures.learned import note
from dape.model.modeling import DapeForCausalLM
from folders import dape, make_run, prepare, refused


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    return make_run(folder / "run", prepare(folder), "dape-kerple")


def plot(run, *words):
    return dape("plot", "learned", run, *words)


def test_the_record_holds_what_the_model_shows_of_the_chosen_query(run, tmp_path, capsys):
    files = [tmp_path / name for name in ("a.json", "a.md", "a.png")]
    words = ("--length", 60, "--query", 44, "--document", 3, "--out", *files)
    assert not plot(run, *words)
    assert capsys.readouterr().out.splitlines() == [f"wrote {file}" for file in files]
    record = load(files[0])
    model = DapeForCausalLM.from_pretrained(run / "model").eval()
    corpus = Corpus(run.parent / "data")
    tokens = torch.from_numpy(corpus.split("test").document(3)[:60])
    (row,) = capture(model, tokens, query=44)
    (layer,) = record.layers
    assert (record.query, record.far, record.document, record.data) == (44, 16, 3, corpus.checksum)
    assert (record.length, record.split) == (60, "test")
    assert record.spans == list(range(46))  # fewer keys than spans: each is its own
    for name in ("scores", "bias", "change"):
        np.testing.assert_allclose(getattr(layer, name), getattr(row, name), rtol=1e-4, atol=1e-7)
    expected = describe(row, 16)
    assert layer.heads == expected
    assert record.provenance["command"].startswith("dape plot learned")
    lines = files[1].read_text().splitlines()
    heads = [line for line in lines if line.startswith("| 0.")]
    assert len(heads) == 2
    assert f"| {expected[1].kind} | {expected[1].positive_far:.0%} |" in heads[1]
    assert "Far keys are 16 tokens or more before the query, 64% of all" in lines[-1]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_a_record_is_drawn_again_without_the_model(run, tmp_path):
    first, again = tmp_path / "a.json", tmp_path / "b.json"
    pictures = [tmp_path / name for name in ("a.svg", "b.svg")]
    assert not plot(run, "--length", 60, "--out", first, pictures[0])
    assert not plot(first, "--out", again, pictures[1])
    assert json.loads(first.read_text()) == json.loads(again.read_text())
    drawn = [
        [line for line in p.read_text().splitlines() if "dc:date" not in line] for p in pictures
    ]
    assert drawn[0] == drawn[1]


def test_half_of_the_keys_are_far_where_none_is_beyond_the_training_length(run, tmp_path):
    assert not plot(run, "--length", 10, "--out", tmp_path / "a.json")
    record = load(tmp_path / "a.json")
    assert record.far == 5 and "half of the keys: 5 tokens" in note(record)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "a.jpg"), "must end in .png, .pdf, .svg, .md, .json"),
        (("--out", "a.png", "--length", "1"), "--length 1: must be at least 2"),
        (("--out", "a.png", "--length", "9", "--query", "9"), "--query 9: must be from 1 to 8"),
        (("--out", "a.png", "--layers", "1", "--length", "9"), "layer 1 is not one of 0 to 0"),
        (("--out", "a.png"), "length 2048: the longest of the 5 documents of the split has"),
        (("--out", "a.png", "--length", "9", "--document", "7"), "document 7 is not one of 0 to 4"),
        (("--out", "a.png", "--length", "9", "--document", "0"), "document 0 has 3 tokens"),
    ],
)
def test_mistakes_are_one_line(run, capsys, words, message):
    assert message in refused(capsys, "plot", "learned", run, *words)


@pytest.mark.parametrize("words", [("--layers", "0"), ("--length", "9"), ("--query", "3")])
def test_a_record_is_drawn_as_it_is(run, tmp_path, capsys, words):
    assert dape("plot", "learned", run, "--length", 16, "--out", tmp_path / "a.json") == 0
    capsys.readouterr()
    drawn = ("plot", "learned", tmp_path / "a.json", "--out", tmp_path / "a.md")
    line = refused(capsys, *drawn, *words)
    assert f"{words[0]}: the record" in line and line.endswith(
        "give the run in place of the record"
    )
    assert dape(*drawn) == 0
