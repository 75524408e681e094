"""Reading a source from front to back, as records in a fixed order."""

import re
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import BinaryIO

from zstandard import ZstdDecompressor, ZstdError

from dape.data.corpora import Part, open_dataset
from dape.errors import UserError
from dape.text import one_line

BLOCK = 2**17  # bytes read at a time
PIECE = 2**22  # bytes of a long text tokenized at a time
WORD = 2**14  # bytes at the end of a piece searched for a place to cut


@dataclass(frozen=True, slots=True)
class Record:
    """A source record: a document before decoding, or a piece of a long document.

    `line` counts from 1. `ends` is true at the end of a document, and `begins` at the beginning.
    `source_bytes` counts the bytes of the part read so far. `problem` explains an unreadable
    record.
    """

    part: Part
    line: int
    raw: bytes
    source_bytes: int
    ends: bool = True
    begins: bool = True
    problem: str | None = None

    @property
    def place(self) -> str:
        """The place as file:line, for messages."""
        return f"{self.part.location}:{self.line}"


def read(part: Part, skip: int = 0) -> Iterator[Record]:
    """Yield the records of `part` after the first `skip`, always in the same order.

    An unreadable line is a record with a `problem`. A file ends at a damaged spot.

    Raises:
        UserError: for a text or a dataset that cannot be read to its end.
    """
    return islice(_records(part), skip, None)


def _records(part: Part) -> Iterator[Record]:
    if part.kind == "dataset":
        yield from _rows(part)
        return
    line, offset = 0, 0
    try:
        with open(part.location, "rb") as file:
            for record in (_text if part.kind == "text" else _json_lines)(part, file):
                line, offset = record.line, record.source_bytes
                yield record
    except (OSError, EOFError, ZstdError) as error:
        if part.kind == "text" and line:  # skipped, half a document would join the next document
            raise UserError(
                f"{part.location} cannot be read further after line {line} ({error}); "
                "run the same command again to resume"
            ) from error
        yield Record(part, line + 1, b"", offset, problem=f"cannot be read further: {error}")


def _text(part: Part, file: BinaryIO) -> Iterator[Record]:
    """Yield a file of a single document, in pieces of limited size."""
    invalid = _invalid_utf8(file)
    if invalid:
        yield Record(part, invalid[0], b"", file.tell(), problem=invalid[1])
        return
    file.seek(0)
    file.seek(len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0)
    line, block, begins = 1, b"", True
    while True:
        block += file.read(PIECE - len(block))
        ends = len(block) < PIECE
        cut = len(block) if ends else _cut(block)
        yield Record(part, line, block[:cut], file.tell(), ends, begins)
        if ends:
            return
        begins = False
        line += block.count(b"\n", 0, cut)
        block = block[cut:]


def _invalid_utf8(file: BinaryIO) -> tuple[int, str] | None:
    """Return the line of the first byte that is not UTF-8, and the reason."""
    decoder = getincrementaldecoder("utf-8")()
    line = 1
    while True:
        block = file.read(PIECE)
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            return line + error.object.count(b"\n", 0, error.start), f"not UTF-8: {error.reason}"
        if not block:
            return None
        line += block.count(b"\n")


def _cut(block: bytes) -> int:
    """Return where to cut a long text: before the last single space between two words.

    Tokenizers start a new word at a space, and pieces of a document have the tokens of the whole.
    Without such a space near the end, the cut is before a newline between two words, and without
    either before the last character. Some tokenizers join a newline to the word before.
    """
    for gap in (rb"(?<=\S) (?=\S)", rb"(?<=\S)\n(?=\S)"):
        gaps = list(re.finditer(gap, block[-WORD:]))
        if gaps:
            return len(block) - WORD + gaps[-1].start()
    last = len(block) - 1
    while block[last] & 0xC0 == 0x80:
        last -= 1
    return last


def _json_lines(part: Part, file: BinaryIO) -> Iterator[Record]:
    compressed = part.location.endswith(".zst")
    chunks = _decompressed(file) if compressed else iter(partial(file.read, BLOCK), b"")
    for number, raw in enumerate(_lines(chunks), 1):
        if raw.strip():
            yield Record(part, number, raw, file.tell())


def _decompressed(file: BinaryIO) -> Iterator[bytes]:
    """Yield the contents of all frames of a zstd file; `EOFError` for an incomplete last frame.

    `stream_reader` accepts an incomplete file without an error.
    """
    decompressor = ZstdDecompressor(max_window_size=2**31)
    frame = decompressor.decompressobj()
    while block := file.read(BLOCK):
        while block:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data
    if not frame.eof:
        raise EOFError("the file ends in the middle of a zstd frame")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for chunk in chunks:
        first, *more = chunk.split(b"\n")
        pending.append(first)
        if more:
            yield b"".join(pending)
            yield from more[:-1]
            pending = [more[-1]]
    if any(pending):
        yield b"".join(pending)


def _rows(part: Part) -> Iterator[Record]:
    name, _, split = part.location.rpartition("#")
    number, offset = 0, 0
    try:
        for number, row in enumerate(open_dataset(name)[split], 1):
            text = row.get(part.text_key)
            if isinstance(text, str):
                raw = text.encode(errors="surrogatepass")
                offset += len(raw)
                yield Record(part, number, raw, offset)
            else:
                columns = ", ".join(row)
                problem = (
                    f"no text in the column {part.text_key!r} (columns: {columns}); "
                    "give another --text-key"
                )
                yield Record(part, number, b"", offset, problem=problem)
    except UserError:
        raise
    except Exception as error:  # the readers of formats and networks raise anything
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UserError(
            f"reading {part.location} ended after row {number} ({reason}); "
            "run the same command again to resume, or mend the dataset"
        ) from error
