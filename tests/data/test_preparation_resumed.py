"""Preparations that are interrupted, killed, or not alone."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import made
import numpy as np
import pytest

from dape.data import prepare, records, writer
from dape.data.encoding import Batch, Encoded, Encoding, encoded
from dape.data.prepare import Options, Preparation
from dape.data.records import Record
from dape.data.shards import Corpus
from dape.data.tokenizer import byte, serialize
from dape.errors import UserError
from dape.files import locked


@pytest.fixture
def small_steps(monkeypatch):
    """Batches of a few documents."""
    monkeypatch.setattr(prepare, "BATCH", 1500)


def interrupted(options, monkeypatch, statuses):
    """Run for some statuses, and for two more that the journal does not know of; tear the ends."""
    run = Preparation(options).run()
    with monkeypatch.context() as patch:
        for seconds, times in [(0.0, statuses), (1e9, 2)]:
            patch.setattr(writer, "JOURNAL_SECONDS", seconds)
            for _ in range(times):
                next(run)
    run.close()
    assert (options.out / "progress.json").exists()
    ends = [max(options.out.glob(f"{name}-*.bin")) for name in writer.SPLITS]
    for path in (*ends, options.out / writer.SKIPPED):
        with open(path, "ab") as file:
            file.write(b"torn")


def header(shard_tokens=100):
    return {
        "dtype": "uint16",
        "tokenizer": {"end_of_text": 0},
        "options": {"shard_tokens": shard_tokens},
    }


def split_writer(folder, written, **options):
    return writer.SplitWriter(folder, "train", header(**options), written)


def test_what_the_journal_notes_is_on_the_disk(tmp_path):
    """Tokens in a buffer would be gone with a killed process."""
    written = writer.Written()
    split = split_writer(tmp_path, written)
    split.append(np.array([3, 4, 0], "uint16"), 2, ends=True)
    split.flush()
    (file,) = tmp_path.glob("*.bin")
    assert np.fromfile(file, "uint16").tolist() == [3, 4, 0]
    assert (written.documents, written.tokens, written.bytes) == (1, 3, 2)
    split.close()
    again = split_writer(tmp_path, written)  # no token more or less than noted
    again.append(np.array([5, 0], "uint16"), 1, ends=True)
    again.finish()
    assert np.fromfile(file, "uint16").tolist() == [3, 4, 0, 5, 0]
    assert (written.documents, written.tokens, written.bytes) == (2, 5, 3)


def test_records_that_the_journal_counts_are_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "JOURNAL_SECONDS", 0.0)
    corpus = writer.CorpusWriter(tmp_path, header(), stop_on_error=False)
    broken = Encoded("a.jsonl:1", "", np.empty(0), 0, True, "not JSON")
    corpus.add([broken, Encoded("a.jsonl:2", "train", np.array([3, 0], "uint16"), 1, True)], 0, 2)
    listed = (tmp_path / "skipped.txt").read_bytes()
    state = json.loads((tmp_path / "progress.json").read_text())["state"]
    assert listed == b"a.jsonl:1: not JSON\n"
    assert (state["broken"], state["listed"], state["records"]) == (1, len(listed), 2)
    assert state["splits"]["train"]["tokens"] == 2
    assert np.fromfile(tmp_path / "train-00000.bin", "uint16").tolist() == [3, 0]
    corpus.close()


def test_a_shard_ends_with_the_document_that_reaches_the_size(tmp_path):
    written = writer.Written()
    split = split_writer(tmp_path, written, shard_tokens=5)
    documents = [[1, 2, 0], [3, 0], [4, 5, 0], [6, 7, 8, 9, 0], [1, 0]]
    for tokens in documents:
        split.append(np.array(tokens, "uint16"), len(tokens) - 1, ends=True)
    split.finish()
    expected = [documents[:2], documents[2:4], documents[4:]]
    assert [each["documents"] for each in written.shards] == [2, 2, 1]
    for shard, inside in zip(written.shards, expected, strict=True):
        tokens = np.fromfile(tmp_path / shard["file"], "uint16").tolist()
        assert tokens == [token for each in inside for token in each]
        assert shard["tokens"] == len(tokens)
        bounds = np.load((tmp_path / shard["file"]).with_suffix(".idx.npy")).tolist()
        assert bounds == np.cumsum([0, *map(len, inside)]).tolist()
    assert len([*tmp_path.iterdir()]) == 6


@pytest.mark.parametrize("stops", [(1,), (2, 3), (7, 1, 9), (25,)])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    sources, tmp_path, monkeypatch, small_steps, stops
):
    fixed = {"on_error": "skip", "shard_tokens": 3000, "workers": 1}
    made.prepare(sources, out=tmp_path / "whole", **fixed)
    options = Options(sources=(str(sources),), out=tmp_path / "parts", **fixed)
    for statuses in stops:
        interrupted(options, monkeypatch, statuses)
        with pytest.raises(UserError, match="no finished corpus"):
            Corpus(options.out)
    assert Preparation(options).resumed
    made.prepare(sources, out=options.out, **fixed)
    assert made.files(options.out) == made.files(tmp_path / "whole")


def test_a_long_document_resumes_in_its_middle(tmp_path, monkeypatch, small_steps):
    monkeypatch.setattr(records, "PIECE", 64)
    monkeypatch.setattr(records, "WORD", 16)
    (text,) = made.texts(1, seed=5, longest=20_000)
    path = tmp_path / "train.txt"
    path.write_bytes(text.encode())
    options = Options(sources=(str(path),), out=tmp_path / "out", workers=1)
    interrupted(options, monkeypatch, 4)
    corpus, _ = made.prepare(path, out=options.out)
    assert made.documents(corpus, "train") == [made.byte_tokens(text)]


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    made.write_zst(tmp_path / "train.jsonl.zst", made.texts(4000))
    arguments = ["prepare", str(tmp_path / "train.jsonl.zst"), "--out", str(tmp_path / "killed")]
    script = (
        "import sys, dape.cli, dape.data.prepare, dape.data.writer\n"
        "dape.data.prepare.BATCH = 2000\n"
        "dape.data.writer.JOURNAL_SECONDS = 0.0\n"
        "dape.cli.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, *arguments, "--workers", "1"]
    journal = tmp_path / "killed" / "progress.json"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not journal.exists() or json.loads(journal.read_bytes())["state"]["records"] < 200:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    made.prepare(tmp_path / "train.jsonl.zst", out=tmp_path / "killed")
    made.prepare(tmp_path / "train.jsonl.zst", out=tmp_path / "whole")
    assert made.files(tmp_path / "killed") == made.files(tmp_path / "whole")


def test_an_interrupted_corpus_of_other_arguments_is_refused(
    sources, tmp_path, monkeypatch, small_steps
):
    options = Options(sources=(str(sources),), out=tmp_path / "out", workers=1)
    interrupted(options, monkeypatch, 3)
    with pytest.raises(UserError, match=r"test 0\.1 is now 0\.3"):
        Preparation(Options(sources=(str(sources),), out=tmp_path / "out", test=0.3))


def test_a_shard_that_lost_bytes_is_not_gone_on_with(sources, tmp_path, monkeypatch, small_steps):
    options = Options(sources=(str(sources),), out=tmp_path / "out", workers=1)
    interrupted(options, monkeypatch, 4)
    (tmp_path / "out" / "train-00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-00000\.bin is shorter than the noted length"):
        next(Preparation(options).run())


def test_a_killed_worker_is_told_with_the_remedy(sources):
    part = prepare.resolve(str(sources)).parts[0]
    how = Encoding(serialize(byte()), 256, "uint16", 0.1, 0.1)
    record = Record(part, 1, b'{"text": "a"}', 13)
    batches = (Batch([record], 0, n, 13 * n) for n in range(1, 10_000))
    results = encoded(batches, how, workers=2)
    _, (first,) = next(results)
    assert first.tokens.tolist() == [97, 256]
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(UserError, match=r"a worker of 2 was killed.*fewer --workers"):
        list(results)


def look_after(name, act, monkeypatch):
    """Let another process `act` in the middle of the look at a folder, before a call of `name`."""
    call = getattr(prepare, name)

    def late(*given):
        monkeypatch.undo()
        act()
        return call(*given)

    monkeypatch.setattr(prepare, name, late)


def test_a_preparation_that_ends_during_the_look_is_finished(sources, tmp_path, monkeypatch):
    """Its journal goes between the question whether there is any, and the reading."""
    options = Options(sources=(str(sources),), out=tmp_path / "out", workers=1, on_error="skip")
    first = Preparation(options).run()
    next(first)
    look_after("read_json", lambda: list(first), monkeypatch)
    assert Preparation(options).finished


def test_a_corpus_that_is_being_replaced_is_not_called_damaged(sources, tmp_path):
    options = Options(sources=(str(sources),), out=tmp_path / "out", workers=1, on_error="skip")
    list(Preparation(options).run())
    (tmp_path / "out" / "train-00000.bin").unlink()
    with locked(options.out, "busy"), pytest.raises(UserError, match="another process is prep"):
        Preparation(options)
    with pytest.raises(UserError, match=r"train-00000\.bin is missing.*again with --overwrite"):
        Preparation(options)


def test_the_journal_of_a_preparation_that_begins_during_the_look_stays(
    sources, tmp_path, monkeypatch
):
    """Without the journal, the folder would hold other files."""
    options = Options(sources=(str(sources),), out=tmp_path / "out", workers=1, on_error="skip")
    list(Preparation(options).run())

    def begin():
        again = Preparation(replace(options, overwrite=True)).run()
        next(again)
        again.close()

    look_after("_refuse_other", begin, monkeypatch)
    assert Preparation(options).finished
    assert Preparation(options).resumed


def test_two_runs_do_not_write_to_one_folder(sources, tmp_path, small_steps):
    options = Options(sources=(str(sources),), out=tmp_path / "out", workers=1, on_error="skip")
    first = Preparation(options).run()
    next(first)
    with pytest.raises(UserError, match="another process is preparing"):
        next(Preparation(options).run())
    first.close()


def test_what_another_process_prepared_meanwhile_is_not_done_again(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    options = Options(
        sources=(str(tmp_path / "a.txt"),), out=tmp_path / "out", validation=0.0, test=0.0
    )
    slow, fast = Preparation(options), Preparation(options)
    for _ in fast.run():
        pass
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert len(list(slow.run())) == 1
    (tmp_path / "out" / ".lock").touch()  # of a process killed at its very end
    assert Preparation(options).finished
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_source_that_changed_since_the_interruption_is_not_mixed_with_its_past(
    tmp_path, monkeypatch, small_steps
):
    path, texts = tmp_path / "train.jsonl", made.texts(40, seed=3)
    path.write_bytes(made.json_lines(texts))
    options = Options(sources=(str(path),), out=tmp_path / "out", workers=1)
    interrupted(options, monkeypatch, 2)
    assert Preparation(options).resumed
    size = path.stat().st_size
    path.write_bytes(made.json_lines(text.swapcase() for text in texts))
    assert path.stat().st_size == size
    os.utime(path, (time.time() + 1,) * 2)  # clocks of file systems tick in milliseconds
    message = rf"{path} changed since the preparation began; start again with --overwrite"
    with pytest.raises(UserError, match=message):
        Preparation(options)
    corpus, _ = made.prepare(path, out=options.out, overwrite=True)
    assert made.documents(corpus, "train") == [made.byte_tokens(text.swapcase()) for text in texts]


@pytest.mark.parametrize("running", [True, False])
def test_an_older_file_put_in_place_of_a_source_is_not_mixed_with_the_source(
    tmp_path, monkeypatch, small_steps, running
):
    path, older, texts = tmp_path / "train.jsonl", tmp_path / "older", made.texts(40, seed=3)
    older.write_bytes(made.json_lines(text.swapcase() for text in texts))
    os.utime(older, (1e9, 1e9))  # as of a file that is moved, or copied with its time
    path.write_bytes(made.json_lines(texts))
    options = Options(sources=(str(path),), out=tmp_path / "out", workers=1)
    monkeypatch.setattr(writer, "JOURNAL_SECONDS", 0.0)
    run = Preparation(options).run()
    next(run)
    next(run)
    time.sleep(0.02)  # clocks of file systems tick in milliseconds
    os.replace(older, path)
    if running:  # the journal is younger than the change
        time.sleep(0.02)
        next(run)
    run.close()
    with pytest.raises(UserError, match=rf"{path} changed since the preparation began; start ag"):
        Preparation(options)


def test_a_journal_without_the_time_of_its_beginning_is_resumed(
    sources, tmp_path, monkeypatch, small_steps
):
    fixed = {"on_error": "skip", "shard_tokens": 3000, "workers": 1}
    made.prepare(sources, out=tmp_path / "whole", **fixed)
    options = Options(sources=(str(sources),), out=tmp_path / "parts", **fixed)
    interrupted(options, monkeypatch, 3)
    journal = options.out / "progress.json"
    content = json.loads(journal.read_text())
    assert content.pop("begun") > 0
    journal.write_text(json.dumps(content))
    assert Preparation(options).resumed
    made.prepare(sources, out=options.out, **fixed)
    assert made.files(options.out) == made.files(tmp_path / "whole")


@pytest.mark.parametrize("statuses", [2, 1000])
def test_what_another_process_prepared_meanwhile_from_another_source_is_refused(
    sources, tmp_path, small_steps, statuses
):
    (tmp_path / "a.txt").write_text("some text")
    fixed = {"out": tmp_path / "out", "workers": 1, "on_error": "skip"}
    slow = Preparation(Options(sources=(str(tmp_path / "a.txt"),), **fixed))
    fast = Preparation(Options(sources=(str(sources),), **fixed)).run()
    for _ in range(statuses):  # killed, or finished
        next(fast, None)
    fast.close()
    before = made.files(tmp_path / "out")
    with pytest.raises(UserError, match=rf"sources {sources} is now {tmp_path}/a\.txt"):
        next(slow.run())
    assert made.files(tmp_path / "out") == before


def test_a_text_whose_disk_fails_is_not_joined_to_the_next_text(tmp_path, monkeypatch, small_steps):
    monkeypatch.setattr(records, "PIECE", 64)
    monkeypatch.setattr(records, "WORD", 16)
    (tmp_path / "train").mkdir()
    texts = made.texts(3, seed=5, longest=5000)
    for number, text in enumerate(texts):
        (tmp_path / "train" / f"{number}.txt").write_bytes(text.encode())
    fixed = {"out": tmp_path / "out", "on_error": "skip", "workers": 1}

    class Failing(io.FileIO):
        reads = 0

        def read(self, size=-1):
            Failing.reads += 1
            if Failing.reads == 170:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with monkeypatch.context() as patch:
        patch.setattr(records, "open", Failing, raising=False)
        with pytest.raises(
            UserError, match=r"1\.txt cannot be read further after line \d+ .*resume"
        ):
            made.prepare(tmp_path / "train", **fixed)
    corpus, problems = made.prepare(tmp_path / "train", **fixed)
    assert problems == []
    assert made.documents(corpus, "train") == [*map(made.byte_tokens, texts)]
