import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dape.cli import main
from dape.data.shards import Corpus
from dape.files import locked


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "abc"}\n{"text": \n{"text": "de"}\n')
    (folder / "test.txt").write_text("xyz")
    (folder / "notes.pdf").write_text("")
    return folder


def run(capsys, *argv):
    status = main(["prepare", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_corpus_is_made_summarized_and_not_made_twice(capsys, sources, tmp_path):
    command = sources, "--out", tmp_path / "out", "--on-error", "skip"
    status, out, err = run(capsys, *command)
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["train", "2", "7", "5", "1"] in rows
    assert ["test", "1", "4", "3", "1"] in rows
    assert ["validation", "0", "0", "0", "0"] in rows
    listed = f"(listed in {tmp_path}/out/skipped.txt)"
    assert f"skipped: 1 broken {listed}, 0 empty documents, 1 file of other kinds" in out
    assert f"skipped {sources}/train.jsonl:2: " in err
    checksum = Corpus(tmp_path / "out").checksum
    assert f"checksum: {checksum}" in out
    manifest = (tmp_path / "out" / "manifest.json").stat()
    status, again, _ = run(capsys, *command)
    assert status == 0
    assert "is prepared already, from the same arguments, and files of the same names" in again
    assert out in again
    assert (tmp_path / "out" / "manifest.json").stat() == manifest


def test_stopping_at_a_broken_line_then_going_on(capsys, sources, tmp_path):
    command = sources, "--out", tmp_path / "out"
    status, _, err = run(capsys, *command)
    assert status == 2
    assert err.splitlines()[-1].startswith(f"dape: error: {sources}/train.jsonl:2: not JSON: ")
    with locked(tmp_path / "out", "busy"):
        status, out, err = run(capsys, *command, "--on-error", "skip")
    assert (status, out) == (2, "") and "another process is preparing" in err
    status, out, _ = run(capsys, *command, "--on-error", "skip")
    assert status == 0
    assert out.startswith(f"Resuming the interrupted preparation of {tmp_path}/out.")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["SOURCES"], "--out"),
        (["SOURCES", "--out", "OUT", "--tokeniser", "byte"], "did you mean '--tokenizer'?"),
        (["SOURCES", "--out", "OUT", "--on-error", "ignore"], "'stop', 'skip'"),
        (["SOURCES", "--out", "OUT", "--workers", "two"], "'two'"),
        (
            ["SOURCES", "--out", "OUT", "--tokenizer", "gpt3"],
            "no tokenizer 'gpt3': give byte, gpt2",
        ),
        (["SOURCES/nowhere.txt", "--out", "OUT"], "no file or folder"),
        (["SOURCES/train.jsonl", "--out", "SOURCES"], "holds other files"),
        (["SOURCES/train.jsonl", "--out", "SOURCES/train.jsonl"], "train.jsonl is no folder; give"),
        (["SOURCES/train.jsonl", "--out", "SOURCES/test.txt/x"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(capsys, sources, tmp_path, argv, message):
    words = {"SOURCES": str(sources), "OUT": str(tmp_path / "out")}
    argv = [word.replace("SOURCES", words["SOURCES"]).replace("OUT", words["OUT"]) for word in argv]
    status, out, err = run(capsys, *argv)
    (line,) = err.splitlines()[-1:]
    assert (status, out) == (2, "")
    assert line.startswith("dape: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_hub_out_of_reach_is_one_line(tmp_path):
    """In a process of its own: the offline switch is read when the hub's library is imported."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    for argv, message in [
        (["--tokenizer", "gpt2"], "give --tokenizer FOLDER, with tokenizer.json in the folder"),
        (["someone/corpus"], "the Hugging Face hub cannot be reached to look for a dataset"),
    ]:
        command = [sys.executable, "-m", "dape", "prepare", *argv, "--out", str(tmp_path / "out")]
        done = subprocess.run(command, env=offline, capture_output=True, text=True)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert message in line


def test_the_default_source_is_this_pythons_library(capsys, tmp_path):
    status, _, _ = run(capsys, "--out", tmp_path / "out")
    assert status == 0
    corpus = Corpus(tmp_path / "out")
    assert corpus.manifest["sources"][0]["python"].startswith("3.")
    text = Path(json.__file__).read_text(encoding="utf-8")
    found = [
        split.document(n).tolist()[:-1]
        for name in ("train", "validation", "test")
        for split in [corpus.split(name)]
        for n in range(split.num_documents)
    ]
    assert list(text.encode()) in found
    for name in ("validation", "test"):
        lengths = corpus.split(name).document_lengths
        assert (lengths > 4096).sum() >= 20
        assert (lengths > 16384).sum() >= 5
