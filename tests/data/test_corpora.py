import os
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dape.data import corpora
from dape.data.corpora import named_split, open_dataset, resolve
from dape.data.encoding import assigned_split
from dape.errors import UserError


@pytest.mark.parametrize(
    ("name", "kind", "split"),
    [
        ("train-00.jsonl.zst", "json", "train"),
        ("validation.jsonl.zst", "json", "validation"),
        ("val.jsonl", "json", "validation"),
        ("arxiv_dev.jsonl", "json", "validation"),
        ("c4-train.00000-of-01024.jsonl.zst", "json", "train"),
        ("contest.jsonl", "json", None),
        ("00.jsonl.zst", "json", None),
        ("pile/train/00.jsonl.zst", "json", "train"),
        ("train/test/00.jsonl", "json", "test"),
        ("test/train-01.jsonl", "json", "train"),
        ("test.txt", "text", "test"),
        ("Train-003.txt", "text", "train"),
        ("test-driven.txt", "text", None),
        ("validation/essay.md", "text", "validation"),
        ("latest/essay.md", "text", None),
    ],
)
def test_splits_are_read_from_names(name, kind, split):
    assert named_split(name, kind) == split


def test_a_folder_is_its_known_files_in_order(tmp_path):
    names = [
        "b.txt",
        "a/x.md",
        "a/notes.pdf",
        "c.tex",
        "d.jsonl",
        "Makefile",
        ".git/x.txt",
        ".y.md",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("abc")
    source = resolve(str(tmp_path))
    assert [part.key for part in source.parts] == ["a/x.md", "b.txt", "c.tex", "d.jsonl"]
    assert [part.kind for part in source.parts] == ["text", "text", "text", "json"]
    assert source.ignored == 2
    description = source.describe()
    assert (description["files"], description["bytes"]) == (4, 12)


def test_links_are_followed_and_cycles_cut(tmp_path):
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    (source / "own").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    for path in (source / "own/a.txt", elsewhere / "b.txt", elsewhere / "deep/c.txt"):
        path.write_text("abc")
    (source / "file.txt").symlink_to(elsewhere / "b.txt")
    (source / "folder").symlink_to(elsewhere)  # with b.txt, which is read once
    (source / "own" / "up").symlink_to(source)
    (elsewhere / "deep" / "self").symlink_to(elsewhere / "deep")
    found = resolve(str(source))
    keys = ["file.txt", "folder/deep/c.txt", "own/a.txt"]
    assert [part.key for part in found.parts] == keys
    assert (found.describe()["files"], found.describe()["bytes"], found.ignored) == (3, 9, 1)
    (tmp_path / "link").symlink_to(source)
    assert [part.key for part in resolve(str(tmp_path / "link")).parts] == keys


def test_pipes_are_other_files(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("abc")
    found = resolve(str(tmp_path))
    assert [part.key for part in found.parts] == ["b.txt"] and found.ignored == 1


def test_the_name_of_the_folder_counts_too(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "one.txt").write_text("abc")
    assert [part.split for part in resolve(str(tmp_path / "test")).parts] == ["test"]


def test_the_fingerprint_follows_names_and_sizes_not_the_place(tmp_path):
    prints = []
    for folder, content in [("a", "abc"), ("b", "xyz"), ("c", "abcd")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.txt").write_text(content)
        prints.append(resolve(str(tmp_path / folder)).describe()["fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_the_standard_library_is_this_pythons():
    source = resolve("python-stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    keys = {part.key for part in source.parts}
    assert {"json/decoder.py", "typing.py", "asyncio/events.py"} <= keys
    assert not [key for key in keys if {"test", "tests", "site-packages"} & set(key.split("/"))]
    assert all(part.size == (root / part.key).stat().st_size for part in source.parts)
    version = ".".join(map(str, sys.version_info[:3]))
    assert source.describe()["python"].startswith(version)


def test_the_standard_library_has_long_documents_in_every_split():
    sizes = {"train": [], "validation": [], "test": []}
    for part in resolve("python-stdlib").parts:
        sizes[assigned_split(part.key.encode(), 0.1, 0.1)].append(part.size)
    for name in ("validation", "test"):
        assert sum(size >= 4096 for size in sizes[name]) >= 20
        assert sum(size >= 16384 for size in sizes[name]) >= 5


def test_assignment_is_stable_and_in_proportion():
    names = [f"document {n}".encode() for n in range(20_000)]
    splits = [assigned_split(name, 0.05, 0.2) for name in names]
    counts = Counter(splits)
    for name, share in [("train", 0.75), ("validation", 0.05), ("test", 0.2)]:
        deviation = np.sqrt(20_000 * share * (1 - share))
        assert abs(counts[name] - 20_000 * share) < 4 * deviation
    assert [assigned_split(name, 0.05, 0.2) for name in reversed(names)] == splits[::-1]
    assert [n for n in range(50) if splits[n] == "validation"] == [40]
    assert [n for n in range(50) if splits[n] == "test"] == [11, 15, 26, 27, 28, 36, 37, 44, 46]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no file or folder './nowhere'"),
        ("missing.jsonl.zst", "no file or folder 'missing.jsonl.zst'"),
        ("FOLDER", "has no files of a known kind"),
        ("FOLDER/x.pdf", "is of an unknown kind (known: .txt, .md, .tex, .jsonl, .jsonl.zst)"),
    ],
)
def test_a_wrong_source_is_told(tmp_path, name, message):
    (tmp_path / "x.pdf").write_text("")
    with pytest.raises(UserError) as caught:
        resolve(name.replace("FOLDER", str(tmp_path)))
    assert message in str(caught.value)


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    (tmp_path / "a.txt").write_text("a")
    listed = os.scandir

    def scandir(folder):
        if str(folder).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot read .*secret: Permission denied"):
        resolve(str(tmp_path))


def test_a_dataset_that_cannot_be_opened_is_told(tmp_path):
    with pytest.raises(UserError, match=r"dataset '/.*' cannot be opened: "):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (("train_sft", "test_sft", "train_gen"), ("train", "test", "train")),
        (("train", "test_matched", "other"), ("train", "test", None)),
        (("train",), (None,)),  # the library's name for a dataset without splits
        (("test",), ("test",)),
    ],
)
def test_splits_are_read_from_the_splits_of_a_dataset(tmp_path, monkeypatch, files, splits):
    datasets = pytest.importorskip("datasets")
    folder = {name: str(tmp_path / f"{name}.jsonl") for name in files}
    for path in folder.values():
        Path(path).write_text('{"text": "a"}\n')
    monkeypatch.setattr(corpora, "reachable", lambda: True)
    opened = datasets.load_dataset("json", data_files=folder, streaming=True)
    monkeypatch.setattr(corpora, "open_dataset", lambda name: opened)
    parts = resolve("someone/corpus").parts
    assert [part.key for part in parts] == list(files)
    assert tuple(part.split for part in parts) == splits
