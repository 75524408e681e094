import json
from codecs import BOM_UTF8

import made
import pytest
import zstandard

from dape.data import records
from dape.data.corpora import Part, resolve
from dape.data.records import read
from dape.errors import UserError


def read_all(path, skip=0):
    (part,) = resolve(str(path)).parts
    return list(read(part, skip))


def json_texts(found):
    return [json.loads(record.raw)["text"] for record in found]


@pytest.mark.parametrize("block", [1, 7, 2**17])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_lines_come_whole_and_in_order_whatever_the_blocks(tmp_path, monkeypatch, suffix, block):
    monkeypatch.setattr(records, "BLOCK", block)
    documents = made.texts(9)
    content = made.json_lines(documents).replace(b"\n", b"\n\n", 2).removesuffix(b"\n")
    path = tmp_path / f"a{suffix}"
    path.write_bytes(zstandard.compress(content) if suffix.endswith("zst") else content)
    found = read_all(path)
    assert json_texts(found) == documents
    assert [record.line for record in found] == [1, 3, 5, 6, 7, 8, 9, 10, 11]
    assert found[-1].place == f"{path}:11"
    assert found[-1].source_bytes == path.stat().st_size
    assert read_all(path, 4) == found[4:]


def test_a_zst_of_several_frames_is_read_to_its_end(tmp_path):
    documents = made.texts(6)
    frames = [zstandard.compress(made.json_lines([text])) for text in documents]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert json_texts(read_all(tmp_path / "a.jsonl.zst")) == documents


def test_a_zst_that_is_cut_short_says_so(tmp_path):
    documents = made.texts(300)
    path = tmp_path / "a.jsonl.zst"
    made.write_zst(path, documents)
    path.write_bytes(path.read_bytes()[:-200])
    *whole, last = read_all(path)
    assert json_texts(whole) == documents[: len(whole)]
    assert last.problem == "cannot be read further: the file ends in the middle of a zstd frame"
    assert last.line == len(whole) + 1


def test_a_file_that_is_no_zst_says_so(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"plainly text\n" * 9)
    (record,) = read_all(tmp_path / "a.jsonl.zst")
    assert "cannot be read further" in record.problem
    assert record.line == 1


@pytest.mark.parametrize(
    "text",
    [
        "word and word\nline\n\n  more " * 40,
        "漢字" * 300,
        "x" + "漢字" * 300,
        "no spaces" * 90,
        " " * 500 + "x" + "\n" * 500,
        "a b" * 33 + "\u00a0é " * 99,
    ],
)
def test_a_long_text_comes_in_pieces_that_join_to_the_whole(tmp_path, monkeypatch, text):
    monkeypatch.setattr(records, "PIECE", 64)
    monkeypatch.setattr(records, "WORD", 16)
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    found = read_all(path)
    assert "".join(record.raw.decode() for record in found) == text
    assert [record.ends for record in found] == [False] * (len(found) - 1) + [True]
    assert max(len(record.raw) for record in found) <= 64
    before = [text.encode()[: sum(len(r.raw) for r in found[:n])] for n in range(len(found))]
    assert [record.line for record in found] == [1 + head.count(b"\n") for head in before]
    assert read_all(path, 3) == found[3:]


def test_a_text_is_cut_between_words(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PIECE", 16)
    monkeypatch.setattr(records, "WORD", 16)
    (tmp_path / "a.txt").write_text("one two three four\nfive  six\n")
    assert [record.raw.decode() for record in read_all(tmp_path / "a.txt")] == [
        "one two three",
        " four",
        "\nfive  six\n",
    ]


@pytest.mark.parametrize("piece", [5, 2**22])
def test_a_byte_that_is_not_utf8_is_found_by_its_line(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(records, "PIECE", piece)
    path = tmp_path / "latin.txt"
    path.write_bytes("première\nligne\n".encode() + "é\n".encode("latin-1") + b"more\n")
    (record,) = read_all(path)
    assert record.place == f"{path}:3"
    assert record.problem == "not UTF-8: invalid continuation byte"
    path.write_bytes("abc\né".encode()[:-1])
    assert [(r.line, r.problem) for r in read_all(path)] == [
        (2, "not UTF-8: unexpected end of data")
    ]


@pytest.mark.parametrize("piece", [5, 2**22])
@pytest.mark.parametrize("text", ["één\ntwee drie", "", "ab"])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, piece, text):
    monkeypatch.setattr(records, "PIECE", piece)
    monkeypatch.setattr(records, "WORD", 4)
    marked, plain = tmp_path / "marked.txt", tmp_path / "plain.txt"
    marked.write_bytes(BOM_UTF8 + text.encode())
    plain.write_bytes(text.encode())
    ours, theirs = (
        [(record.raw, record.line, record.ends) for record in read_all(path)]
        for path in (marked, plain)
    )
    assert ours == theirs
    assert read_all(marked)[-1].source_bytes == marked.stat().st_size


def test_a_file_that_is_gone_says_so(tmp_path):
    path = tmp_path / "gone.txt"
    path.write_text("abc")
    (part,) = resolve(str(path)).parts
    path.unlink()
    (record,) = read(part)
    assert "No such file" in record.problem


def test_a_dataset_is_read_row_by_row(tmp_path):
    documents = made.texts(5)
    (tmp_path / "train.jsonl").write_bytes(made.json_lines(documents))
    (tmp_path / "test.jsonl").write_text('{"text": "a", "meta": 1}\n{"text": null, "meta": 2}\n')
    rows = list(read(Part(f"{tmp_path}#train", "train", "dataset", None, "train"), 2))
    assert [record.raw.decode() for record in rows] == documents[2:]
    assert rows[0].place == f"{tmp_path}#train:3"
    good, bad = read(Part(f"{tmp_path}#test", "test", "dataset", None, "test"))
    assert (good.raw, good.problem) == (b"a", None)
    assert bad.problem == (
        "no text in the column 'text' (columns: text, meta); give another --text-key"
    )


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ConnectionError("no network"), "after row 1 (ConnectionError: no network); "),
        (KeyError("key"), "after row 1 (KeyError: 'key'); "),
        (ZeroDivisionError("of\na reader"), "after row 1 (ZeroDivisionError: of a reader); "),
        (None, "after row 0 (ArrowInvalid: JSON parse error"),
    ],
)
def test_a_dataset_that_breaks_off_is_told_with_its_row(tmp_path, monkeypatch, failure, reason):
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "a"}\n{"text": "cut off\n')
    if failure:  # of a network or a reader, in place of a damaged file

        def rows():
            yield {"text": "a"}
            raise failure

        monkeypatch.setattr(records, "open_dataset", lambda name: {"train": rows()})
    with pytest.raises(UserError) as caught:
        list(read(Part(f"{tmp_path}#train", "train", "dataset", None, "train")))
    message = str(caught.value)
    assert message.startswith(f"reading {tmp_path}#train ended {reason}")
    assert message.endswith("; run the same command again to resume, or mend the dataset")
    assert "\n" not in message
