import hashlib
import json
import shutil
from unittest.mock import Mock

import made
import numpy as np
import pytest
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dape.data import shards
from dape.data.shards import Corpus, Split, Windows, _mixed
from dape.data.tokenizer import fingerprint, saved
from dape.errors import UserError

TEXTS = made.texts(40)
STREAM = [token for text in TEXTS for token in made.byte_tokens(text)]
KEY = 25  # tokens that occur together but once
PLACES = {tuple(STREAM[i : i + KEY]): i for i in range(len(STREAM) - KEY + 1)}
assert len(PLACES) == len(STREAM) - KEY + 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    made.write_zst(folder / "train.jsonl.zst", TEXTS)
    return made.prepare(folder / "train.jsonl.zst", out=folder / "out", shard_tokens=1000)[0]


@pytest.fixture(scope="module")
def split(corpus):
    assert len(corpus.manifest["splits"]["train"]["shards"]) > 3
    return corpus.split("train")


def test_documents_come_back_with_their_end(split):
    assert split.num_documents == len(TEXTS)
    assert [split.document(n).tolist() for n in range(40)] == [*map(made.byte_tokens, TEXTS)]
    assert split.document_lengths.tolist() == [len(text.encode()) + 1 for text in TEXTS]


def test_slices_do_not_show_where_shards_end(split):
    assert split.num_tokens == len(STREAM)
    assert split.slice(0, len(STREAM)).tolist() == STREAM
    for start in range(0, len(STREAM), 97):
        for stop in (start, start + 1, min(start + 1234, len(STREAM))):
            assert split.slice(start, stop).tolist() == STREAM[start:stop]
    assert split.slice(len(STREAM), len(STREAM)).dtype == np.int64


def test_what_lies_outside_is_refused(split):
    for start, stop in [(-1, 3), (5, 4), (0, len(STREAM) + 1)]:
        with pytest.raises(IndexError, match=f"tokens {start}:{stop}"):
            split.slice(start, stop)
    for n in (-1, 40):
        with pytest.raises(IndexError, match=f"document {n} of 40"):
            split.document(n)


def starts(windows, epoch):
    """Where in the stream the windows of an epoch begin, in their order."""
    found = []
    for n in range(epoch * len(windows), (epoch + 1) * len(windows)):
        window = windows[n].tolist()
        start = PLACES[tuple(window[:KEY])]
        assert window == STREAM[start : start + windows.length + 1]
        found.append(start)
    return found


@pytest.mark.parametrize("length", [24, 100, 3000, len(STREAM) // 2 + 1, len(STREAM) - 1])
def test_each_epoch_has_every_window_once(split, length):
    windows = Windows(split, length, seed=3)
    assert len(windows) == max(1, (len(STREAM) - length) // length)
    for epoch in range(4):
        ordered = sorted(starts(windows, epoch))
        assert np.diff(ordered).tolist() == [length] * (len(windows) - 1)
        assert ordered[0] < length


def test_order_and_offset_differ_by_epoch_and_seed(split):
    windows = Windows(split, 24, seed=3)
    first, second = starts(windows, 0), starts(windows, 1)
    other = starts(Windows(split, 24, seed=4), 0)
    for one, two in [(first, second), (first, other)]:
        assert min(one) != min(two)
        assert np.argsort(one).tolist() != np.argsort(two).tolist()


def test_a_window_depends_on_its_number_alone(split):
    windows = Windows(split, 24, seed=3)
    numbers = [1000, 3, 77_777, 0, 1000]
    fresh = [Windows(split, 24, seed=3)[n].tolist() for n in numbers]
    assert [windows[n].tolist() for n in numbers] == fresh
    assert fresh[0] == fresh[-1] != fresh[1]
    with pytest.raises(IndexError, match="numbered from 0"):
        windows[-1]


def test_iterating_ends_after_an_epoch(split):
    windows = Windows(split, 100, seed=0)
    assert [window.tolist() for window in windows] == [
        windows[n].tolist() for n in range(len(windows))
    ]


def test_every_place_in_the_order_and_every_offset_is_equally_likely(split):
    length = len(STREAM) // 8
    windows = Windows(split, length, seed=0)
    assert len(windows) == 7
    epochs = np.array([starts(windows, epoch) for epoch in range(700)])
    offsets = epochs.min(axis=1, keepdims=True)
    places = (epochs - offsets) // length
    for column in places.T:
        assert chisquare(np.bincount(column, minlength=7)).pvalue > 1e-3
    counts, _ = np.histogram(offsets, bins=10, range=(0, length))
    assert chisquare(counts).pvalue > 1e-3


def numbers(count):
    """Return a split whose tokens are 0, 1, ..."""
    return Mock(spec=Split, num_tokens=count, slice=np.arange)


def test_the_order_of_a_seed_is_that_of_earlier_versions():
    """Runs that resume, and the measured results, follow from it."""
    state, step = 1234567, 0x9E3779B97F4A7C15  # the published test of SplitMix64
    assert [_mixed((state + n * step) % 2**64) for n in range(1, 4)] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423
    ]  # fmt: skip
    for count, first in ((40, [607, 631, 727, 103]), (64, [607, 631, 727, 1351])):
        windows = Windows(numbers(24 * (count + 1)), 24, seed=3)
        assert len(windows) == count and [windows[n][0] for n in range(4)] == first


@pytest.mark.parametrize("count", [1, 2, 3, 5, 17, 49, 64, 65])
def test_windows_of_a_single_token_have_a_label(count):
    windows = Windows(numbers(count + 1), 1, seed=0)
    assert sorted(window.tolist() for window in windows) == [[n, n + 1] for n in range(count)]


def test_a_split_without_a_window_is_refused(split):
    with pytest.raises(UserError, match=f"has {len(STREAM)} tokens, too few for a window"):
        Windows(split, len(STREAM), seed=0)
    with pytest.raises(UserError, match="window length 0"):
        Windows(split, 0, seed=0)


def test_the_corpus_names_its_splits(corpus):
    with pytest.raises(UserError, match="unknown split 'valid'; did you mean 'validation'"):
        corpus.split("valid")
    with pytest.raises(UserError, match=r"'test' of .* has no documents \(only train\)"):
        corpus.split("test")


def test_the_tokenizer_comes_with_the_corpus(corpus):
    tokenizer = corpus.tokenizer()
    assert (corpus.vocab_size, corpus.end_of_text) == (257, 256)
    assert tokenizer.eos_token_id == 256
    assert fingerprint(tokenizer) == corpus.manifest["tokenizer"]["fingerprint"]
    document = corpus.split("train").document(5)
    assert tokenizer.decode(document) == TEXTS[5] + "<|endoftext|>"


@pytest.mark.parametrize("added", [True, False])
def test_a_tokenizer_that_names_no_end_of_text_is_that_of_its_corpus(tmp_path, added):
    vocabulary = {f"<0x{value:02X}>": value for value in range(256)} | {"</s>": 256, "a": 257}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    if added:
        backend.add_special_tokens(["</s>"])
    (tmp_path / "model").mkdir()
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    made.write_zst(tmp_path / "train.jsonl.zst", ["a text"])
    source, model = tmp_path / "train.jsonl.zst", str(tmp_path / "model")
    corpus, _ = made.prepare(source, out=tmp_path / "out", tokenizer=model)
    assert corpus.end_of_text == 256
    own = saved(model)
    assert own.eos_token_id is None
    corpus.check_model(model, 258, own, model)
    for other in (["</s>", "b"], ["<eos>", "a"]):
        names = dict(zip(["</s>", "a"], other, strict=True))
        swapped = {names.get(token, token): number for token, number in vocabulary.items()}
        backend = Tokenizer(models.BPE(vocab=swapped, merges=[], byte_fallback=True))
        another = PreTrainedTokenizerFast(tokenizer_object=backend)
        with pytest.raises(UserError, match="was not prepared with the tokenizer of"):
            corpus.check_model(model, 258, another, model)
        path = corpus.folder / "tokenizer"
        kept = shutil.copytree(path, tmp_path / "kept", dirs_exist_ok=True)
        another.save_pretrained(path)
        with pytest.raises(UserError, match="was not prepared with the tokenizer of"):
            corpus.check_model(model, 258, own, model)
        shutil.copytree(kept, path, dirs_exist_ok=True)
    lower = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="was not prepared with the tokenizer of"):
        corpus.check_model(model, 258, PreTrainedTokenizerFast(tokenizer_object=lower), model)


def test_the_end_of_text_may_be_the_first_token(tmp_path):
    """As of GPT-NeoX."""
    backend = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, "a": 1, "b": 2}, merges=[]))
    named = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    named.save_pretrained(tmp_path / "tokenizer")
    made.write_zst(tmp_path / "train.jsonl.zst", ["ab", "b"])
    source, tokenizer = tmp_path / "train.jsonl.zst", str(tmp_path / "tokenizer")
    corpus, _ = made.prepare(source, out=tmp_path / "out", tokenizer=tokenizer)
    assert made.documents(corpus, "train") == [[1, 2, 0], [2, 0]]


def merged(folder, merges):
    """Save a tokenizer of bytes with merges; texts of other characters have the same tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "<|endoftext|>", *map("".join, merges)]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    named.save_pretrained(folder)
    return folder


def test_a_corpus_with_another_tokenizer_is_another_corpus(tmp_path):
    made.write_zst(tmp_path / "train.jsonl.zst", TEXTS[:3])
    merges = [[("q", "q"), ("q", "x")], [("q", "x"), ("q", "q")], [("q", "q"), ("q", "z")]]
    first, *others = (
        made.prepare(
            tmp_path / "train.jsonl.zst",
            out=tmp_path / f"out{number}",
            tokenizer=str(merged(tmp_path / str(number), pairs)),
        )[0]
        for number, pairs in enumerate(merges)
    )
    for other in others:
        assert made.documents(other, "train") == made.documents(first, "train")
        assert other.checksum != first.checksum
        folder = shutil.copytree(first.folder, tmp_path / "copy")
        assert Corpus(folder).checksum == first.checksum
        file = folder / "tokenizer" / "tokenizer.json"
        shutil.copy(other.folder / "tokenizer" / "tokenizer.json", file)
        with pytest.raises(UserError, match=r"has another tokenizer\.json than the preparation"):
            Corpus(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["tokenizer"]["file"]  # as earlier versions wrote the manifest
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert Corpus(folder).checksum == first.checksum
        shutil.rmtree(folder)


def damaged(corpus, folder, damage):
    copy = folder / "copy"
    copy.mkdir()
    for name, content in made.files(corpus.folder).items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(content)
    damage(copy)
    with pytest.raises(UserError) as caught:
        Corpus(copy)
    return str(caught.value)


def test_a_folder_that_is_no_corpus_is_refused_with_the_remedy(corpus, tmp_path):
    with pytest.raises(
        UserError, match=r"no finished corpus in .*; run `dape prepare SOURCE --out"
    ):
        Corpus(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is not JSON"),
        (lambda f: (f / "manifest.json").write_text('{"format": 0}'), "the format is 0, not 1"),
        (
            lambda f: (f / "manifest.json").write_text('{"format": 1}'),
            "manifest.json has not the expected fields",
        ),
        (lambda f: (f / "train-00001.bin").unlink(), "train-00001.bin is missing, or has not"),
        (lambda f: (f / "train-00001.idx.npy").unlink(), "train-00001.bin is missing, or has not"),
        (lambda f: (f / "train-00000.bin").write_bytes(b"ab"), "train-00000.bin is missing, or"),
        (
            lambda f: (f / "tokenizer" / "tokenizer.json").unlink(),
            "tokenizer has no tokenizer.json",
        ),
    ],
)
def test_damage_is_told_with_the_remedy(corpus, tmp_path, damage, message):
    told = damaged(corpus, tmp_path, damage)
    assert message in told
    assert told.endswith("prepare the corpus again with --overwrite")


def test_the_manifest_adds_up(corpus):
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    assert (train["documents"], train["tokens"]) == (len(TEXTS), len(STREAM))
    assert train["bytes"] == sum(len(text.encode()) for text in TEXTS)
    for key in ("documents", "tokens"):
        assert sum(shard[key] for shard in train["shards"]) == train[key]
    assert corpus.checksum == manifest["checksum"]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00000.bin", lambda old: old[:-1] + bytes([old[-1] ^ 1]), "has not the checksum"),
        ("train-00001.idx.npy", lambda old: old[:-1] + b"\1", "does not belong to the shard"),
        ("train-00001.idx.npy", lambda old: old[:40], "does not belong to the shard"),
        ("train-00001.idx.npy", lambda old: b"", "does not belong to the shard"),
    ],
)
def test_tokens_that_changed_since_they_were_written_are_refused(
    corpus, tmp_path, name, damage, message
):
    folder = shutil.copytree(corpus.folder, tmp_path / "copy")
    assert Corpus(folder).split("train").num_tokens == len(STREAM)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(UserError, match=f"{name} {message}"):
        Corpus(folder).split("train")


@pytest.mark.parametrize("block", [1, 7, 2**24])
def test_a_long_shard_is_scanned_in_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(shards, "SCAN", block)
    path = tmp_path / "long.bin"
    np.array(STREAM, "uint16").tofile(path)
    checksum, bounds = shards.scan(path, "uint16", 256)
    assert checksum == hashlib.sha256(path.read_bytes()).hexdigest()
    assert bounds.tolist() == [0, *(n for n, token in enumerate(STREAM, 1) if token == 256)]


def test_tokens_are_verified_once(corpus, monkeypatch):
    corpus.split("train")
    monkeypatch.setattr("dape.data.shards.scan", None)
    corpus.split("train")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("checksum", None, "its checksum is not that of what it names"),
        ("checksum", "0" * 64, "its checksum is not that of what it names"),
        ("dtype", "uint32", "its checksum is not that of what it names"),
        ("splits", 3, "its checksum is not that of what it names"),
        ("tokenizer", {}, "it has not the expected fields"),
    ],
)
def test_a_manifest_of_other_fields_is_damaged(corpus, tmp_path, name, value, message):
    folder = shutil.copytree(corpus.folder, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text()) | {name: value}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"manifest\.json:? {message.removeprefix('it ')}"):
        Corpus(folder)


@pytest.mark.parametrize("name", ["vocab_size", "end_of_text"])
@pytest.mark.parametrize("value", [-1, "256", None])
def test_a_manifest_without_whole_numbers_of_tokens_is_damaged(corpus, tmp_path, name, value):
    """The checksum covers the tokenizer itself, not these numbers."""
    folder = shutil.copytree(corpus.folder, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"][name] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: token=.* must be"):
        Corpus(folder)
