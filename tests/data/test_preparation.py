"""What a corpus holds of its sources, and what is refused."""

import json
import os
from pathlib import Path

import made
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dape.data import prepare, records, writer
from dape.data.prepare import Options, Preparation
from dape.errors import UserError
from folders import spaced_tokenizer


def test_documents_are_the_tokens_of_their_texts_in_order(tmp_path):
    expected = {
        "train": made.texts(30, 1),
        "validation": made.texts(9, 2),
        "test": made.texts(8, 3),
    }
    (tmp_path / "in").mkdir()
    for name, documents in expected.items():
        made.write_zst(tmp_path / "in" / f"{name}-00.jsonl.zst", documents)
    corpus, problems = made.prepare(tmp_path / "in", out=tmp_path / "out")
    assert problems == []
    for name, documents in expected.items():
        assert made.documents(corpus, name) == [*map(made.byte_tokens, documents)]


def test_a_bpe_corpus_equals_tokenizing_anew(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    documents = [text.replace(special[0], "ab cd abc") for text in made.texts(20)]
    tokenizer.train_from_iterator(documents, trainer)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    made.write_zst(tmp_path / "train.jsonl.zst", documents)
    corpus, _ = made.prepare(
        tmp_path / "train.jsonl.zst", out=tmp_path / "out", tokenizer=str(tmp_path / "tokenizer")
    )
    assert corpus.end_of_text == tokenizer.token_to_id(special[0])
    expected = [[*tokenizer.encode(text).ids, corpus.end_of_text] for text in documents]
    assert made.documents(corpus, "train") == expected
    split = corpus.split("train")
    decoded = [corpus.tokenizer().decode(split.document(n)[:-1]) for n in range(20)]
    assert decoded == documents


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_that_spells_the_end_of_text_as_a_word_is_refused(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(prepare, "BATCH", 1)  # two workers take two batches
    words = {"<unk>": 0, "a": 1, "b": 2, "</s>": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path / "words")
    path = tmp_path / "train.jsonl"
    options = {"tokenizer": str(tmp_path / "words"), "workers": workers}
    path.write_bytes(made.json_lines(["a</s> b", "b a"]))
    corpus, _ = made.prepare(path, out=tmp_path / "good", **options)
    assert made.documents(corpus, "train") == [[0, 2, 3], [2, 1, 3]]
    path.write_bytes(made.json_lines(["b a", "a </s> b"]))
    with pytest.raises(UserError, match=rf"{path}:2: the tokenizer reads the end of text in ordin"):
        made.prepare(path, out=tmp_path / "out", on_error="skip", **options)


def test_a_text_file_is_a_document_however_long(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PIECE", 64)
    monkeypatch.setattr(records, "WORD", 16)
    monkeypatch.setattr(prepare, "BATCH", 100)
    documents = made.texts(6, longest=5000)
    (tmp_path / "in").mkdir()
    for n, text in enumerate(documents):
        (tmp_path / "in" / f"train-{n}.txt").write_bytes(text.encode())
    corpus, _ = made.prepare(tmp_path / "in", out=tmp_path / "out", shard_tokens=3000)
    assert made.documents(corpus, "train") == [*map(made.byte_tokens, documents)]


WORDS = "cat, a b\u00e9 in.\na hat {\nthe  end;\n" * 30
GPT_4 = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(first, pattern=None):
    """Return a byte-level BPE of a few merges, which may put a space `first`."""
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    level = pre_tokenizers.ByteLevel(add_prefix_space=first, use_regex=not split)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([WORDS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize(
    "tokenizer",
    [
        spaced_tokenizer(),
        *(spaced_tokenizer(space) for space in ("first", "always", "never")),
        byte_level(first=False),
        byte_level(first=True),
        byte_level(first=False, pattern=GPT_4),
    ],
    ids=["Llama 2", "first", "always", "never", "GPT-2", "RoBERTa", "GPT-4"],
)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(records, "PIECE", 64)
    monkeypatch.setattr(records, "WORD", 32)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, text in (("words", WORDS), ("lines", "a\n" * 99), ("signs", "\u6f22" * 99)):
        (path := tmp_path / f"{name}.txt").write_bytes(text.encode())
        made_of = {"tokenizer": str(tmp_path / "tokenizer"), "validation": 0.0, "test": 0.0}
        corpus, _ = made.prepare(path, out=tmp_path / name, workers=1, **made_of)
        whole = tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert made.documents(corpus, "train") == [[*whole, tokenizer.eos_token_id]]


def test_documents_go_to_the_split_of_their_content(tmp_path):
    documents = made.texts(400, longest=30)
    for name, ordered in [("one", documents), ("two", documents[::-1])]:
        (tmp_path / f"{name}.jsonl").write_bytes(made.json_lines(ordered))
    corpora = [made.prepare(tmp_path / f"{n}.jsonl", out=tmp_path / n)[0] for n in ("one", "two")]
    for name in ("train", "validation", "test"):
        one, two = (made.documents(corpus, name) for corpus in corpora)
        assert one == two[::-1]
        assert len(one) > 20
    everything = [
        document for name in writer.SPLITS for document in made.documents(corpora[0], name)
    ]
    assert sorted(everything) == sorted(map(made.byte_tokens, documents))


def test_what_is_broken_is_told_counted_and_listed(sources, tmp_path):
    corpus, problems = made.prepare(sources, out=tmp_path / "out", on_error="skip")
    assert [problem.partition(": ")[0] for problem in problems] == [
        f"{sources}/b.jsonl:18",
        f"{sources}/more/latin.txt:1",
    ]
    assert corpus.manifest["skipped"] == {"broken": 2, "empty": 0}
    assert (tmp_path / "out" / "skipped.txt").read_text() == "".join(f"{p}\n" for p in problems)
    splits = corpus.manifest["splits"].values()
    assert sum(split["documents"] for split in splits) == 60 + 59 + 20


def test_files_may_have_names_that_are_not_utf8(tmp_path):
    (tmp_path / "in").mkdir()
    for name, content in [(b"caf\xe9.txt", b"some text"), (b"caf\xe9.jsonl", b'{"text": 3}')]:
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name)).write_bytes(content)
    options = {"on_error": "skip", "validation": 0.0, "test": 0.0}
    corpus, (problem,) = made.prepare(tmp_path / "in", out=tmp_path / "out", **options)
    assert made.documents(corpus, "train") == [made.byte_tokens("some text")]
    assert corpus.manifest["skipped"] == {"broken": 1, "empty": 0}
    listed = problem.replace("\udce9", r"\udce9")
    assert (tmp_path / "out" / "skipped.txt").read_text() == f"{listed}\n"


def test_links_to_nothing_are_told_counted_and_listed(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("abc")
    (source / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    corpus, problems = made.prepare(source, out=tmp_path / "out", on_error="skip")
    (problem,) = problems
    assert problem.startswith(f"{source}/gone.txt:1: ") and "No such file" in problem
    assert corpus.manifest["skipped"] == {"broken": 1, "empty": 0}
    assert (tmp_path / "out" / "skipped.txt").read_text() == f"{problem}\n"
    with pytest.raises(UserError, match=r"gone.txt:1: cannot be read further: .*--on-error skip"):
        made.prepare(source, out=tmp_path / "other")


def test_a_file_linked_twice_is_a_document_of_a_single_split(tmp_path):
    texts = [f"text number {number}" for number in range(30)]
    (tmp_path / "source" / "first").mkdir(parents=True)
    for number, text in enumerate(texts):
        (tmp_path / "source" / "first" / f"{number}.txt").write_text(text)
    (tmp_path / "source" / "latest").symlink_to("first")
    corpus, _ = made.prepare(tmp_path / "source", out=tmp_path / "out", workers=1)
    found = [each for name in writer.SPLITS for each in made.documents(corpus, name)]
    assert sorted(found) == sorted(made.byte_tokens(text) for text in texts)


def test_text_may_stand_under_another_key(tmp_path):
    texts = made.texts(5)
    lines = [json.dumps({"content": text, "text": 3}) + "\n" for text in texts]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    corpus, _ = made.prepare(tmp_path / "train.jsonl", out=out, text_key="content")
    assert made.documents(corpus, "train") == [made.byte_tokens(text) for text in texts]
    with pytest.raises(UserError, match="text_key content is now text"):
        made.prepare(tmp_path / "train.jsonl", out=out)
    # A corpus of before there was a choice is the same as one of the usual key.
    (tmp_path / "train.jsonl").write_bytes(made.json_lines(texts))
    corpus, _ = made.prepare(tmp_path / "train.jsonl", out=tmp_path / "old")
    path = tmp_path / "old" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["options"].pop("text_key") == "text"
    path.write_text(json.dumps(manifest))
    assert Preparation(Options(sources=(str(tmp_path / "train.jsonl"),), out=path.parent)).finished


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
        (b"[1, 2]", 'not an object with a string "text"; give another --text-key'),
        (b'{"meta": {}}', 'not an object with a string "text"; give another --text-key'),
        (b'{"text": 5}', 'not an object with a string "text"; give another --text-key'),
        (b'{"text": "\\ud800"}', "surrogates not allowed"),
        (b'{"text": "\xe9"}', "can't decode byte"),
        (b"[" * 100_000, "while decoding a JSON array"),
    ],
)
def test_a_broken_line_stops_with_its_place_and_can_be_skipped(tmp_path, line, reason):
    good = made.texts(3)
    whole = made.json_lines(good).splitlines(keepends=True)
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"".join([*whole[:2], line, b"\n", whole[2]]))
    with pytest.raises(UserError) as caught:
        made.prepare(path, out=tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert reason in message
    assert "--on-error skip" in message
    corpus, problems = made.prepare(path, out=tmp_path / "out", on_error="skip")
    assert len(problems) == 1
    assert made.documents(corpus, "train") == [*map(made.byte_tokens, good)]


def test_empty_documents_are_counted(tmp_path):
    lines, empty = tmp_path / "train.jsonl", tmp_path / "test.txt"
    lines.write_text('{"text": ""}\n{"text": "a"}\n{"text": ""}\n')
    empty.write_text("")
    corpus, _ = made.prepare(lines, empty, out=tmp_path / "out")
    assert corpus.manifest["skipped"] == {"broken": 0, "empty": 3}
    assert made.documents(corpus, "train") == [made.byte_tokens("a")]


def test_the_number_of_workers_changes_nothing(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH", 1500)
    for workers in (1, 2):
        options = {"on_error": "skip", "shard_tokens": 3000, "workers": workers}
        made.prepare(sources, out=tmp_path / str(workers), **options)
    assert made.files(tmp_path / "1") == made.files(tmp_path / "2")


def test_a_finished_corpus_is_left_alone_and_others_are_refused(sources, tmp_path):
    fixed = {"out": tmp_path / "out", "on_error": "skip", "workers": 1}
    made.prepare(sources, **fixed)
    before = made.files(tmp_path / "out")
    (tmp_path / "out" / "progress.json").write_text("as of a run killed at its very end")
    again = {**fixed, "workers": 2, "on_error": "stop"}
    assert Preparation(Options(sources=(str(sources),), **again)).finished
    for other, message in [
        ({"validation": 0.2}, "validation 0.1 is now 0.2"),
        ({"shard_tokens": 7}, "shard_tokens 134217728 is now 7"),
        ({"sources": (f"{sources}/more",)}, f"sources {sources} is now {sources}/more"),
    ]:
        with pytest.raises(UserError) as caught:
            Preparation(Options(**{"sources": (str(sources),), **fixed, **other}))
        assert message in str(caught.value)
        assert "--overwrite" in str(caught.value)
    (sources / "b.jsonl").write_bytes(b'{"text": "changed"}')
    with pytest.raises(UserError, match=f"sources {sources} changed since"):
        Preparation(Options(sources=(str(sources),), **fixed))
    assert made.files(tmp_path / "out") == before


def test_overwriting_replaces_the_corpus_and_nothing_else(sources, tmp_path):
    out = tmp_path / "out"
    made.prepare(sources, out=out, on_error="skip", shard_tokens=2000)
    (out / "notes.md").write_text("mine")
    made.write_zst(tmp_path / "train.jsonl.zst", ["a", "b"])
    corpus, _ = made.prepare(tmp_path / "train.jsonl.zst", out=out, overwrite=True)
    assert made.documents(corpus, "train") == [made.byte_tokens("a"), made.byte_tokens("b")]
    left = {path.name for path in out.iterdir()}
    assert left == {
        "manifest.json",
        "tokenizer",
        "train-00000.bin",
        "train-00000.idx.npy",
        "notes.md",
    }


def test_a_folder_of_other_files_is_refused(sources, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds other files"):
            Preparation(Options(sources=(str(sources),), out=tmp_path / "out", overwrite=overwrite))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_a_corpus_within_its_source_is_refused(sources):
    with pytest.raises(UserError, match="lies in the source"):
        Preparation(Options(sources=(str(sources),), out=sources / "more" / "out"))


def test_sources_without_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="the sources have no text"):
        made.prepare(tmp_path / "a.txt", out=tmp_path / "out")


def test_the_checksum_is_of_the_data(tmp_path):
    checksums = []
    for folder, text in [("a", "one"), ("b", "one"), ("c", "two")]:
        (tmp_path / folder).mkdir()
        made.write_zst(tmp_path / folder / "train.jsonl.zst", [text])
        corpus, _ = made.prepare(tmp_path / folder, out=tmp_path / f"{folder}-out")
        checksums.append(corpus.checksum)
    assert checksums[0] == checksums[1] != checksums[2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"validation": 0.6, "test": 0.4}, "validation 0.6 and test 0.4 must be fractions"),
        ({"test": -0.1}, "must be fractions of at least 0"),
        ({"sources": ("",)}, "source '' has no name; give a file, a folder or a dataset"),
        ({"sources": ("a", "b", "a")}, "source 'a' is given twice"),
        ({"workers": 0}, "workers 0 must be at least 1"),
        ({"shard_tokens": 0}, "shard_tokens 0 must be at least 1"),
    ],
)
def test_impossible_options_are_told(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        Options(out=tmp_path, **wrong)


def test_a_file_of_two_sources_is_refused(tmp_path):
    (tmp_path / "text" / "train").mkdir(parents=True)
    (tmp_path / "text" / "train" / "a.txt").write_text("a")
    text = tmp_path / "text"
    for other in (f"{text}/../text", text / "train", text / "train" / "a.txt"):
        with pytest.raises(UserError, match=r"both have .*a\.txt; leave out one of the sources"):
            Preparation(Options(sources=(str(text), str(other)), out=tmp_path / "out"))
