"""Writing a corpus, resumable after an interruption."""

import os
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dape.data.encoding import Encoded
from dape.data.shards import MANIFEST, checksum_of, index_file, scan, tokenizer_checksum
from dape.errors import UserError
from dape.files import read_json, whole, write_json

JOURNAL = "progress.json"
SKIPPED = "skipped.txt"
AGAIN = "start again with --overwrite"
SPLITS = ("train", "validation", "test")
JOURNAL_SECONDS = 1.0  # the most work lost by an interruption


@dataclass(slots=True)
class Written:
    """The progress of a split; tokens beyond the finished `shards` are in an open shard."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)

    @property
    def open_tokens(self) -> int:
        """Number of tokens in the open shard."""
        return self.tokens - sum(shard["tokens"] for shard in self.shards)


@dataclass(slots=True)
class State:
    """The progress of a corpus: `records` of part number `part` are read, and all earlier parts.

    `listed` is the length of the list of skipped records, in bytes.
    """

    part: int = 0
    records: int = 0
    broken: int = 0
    empty: int = 0
    listed: int = 0
    splits: dict[str, Written] = field(default_factory=lambda: {name: Written() for name in SPLITS})

    @classmethod
    def load(cls, entry: dict[str, Any]) -> "State":
        """Return the state from its `asdict`, the inverse of `asdict`."""
        splits = {name: Written(**written) for name, written in entry["splits"].items()}
        return cls(**{**entry, "splits": splits})


def begun_of(journal: dict[str, Any]) -> int:
    """Return the time at which a preparation began, in nanoseconds; 0 in earlier versions."""
    return int(journal.get("begun", 0))


class SplitWriter:
    """Appends documents to the shards of a split, after the tokens in `written`.

    A shard ends with the first document that reaches the wanted size. No document spans two shards.
    """

    def __init__(self, folder: Path, name: str, header: dict[str, Any], written: Written) -> None:
        self._folder, self._name, self._written = folder, name, written
        self._dtype = np.dtype(header["dtype"])
        self._end_of_text = header["tokenizer"]["end_of_text"]
        self._shard_tokens = header["options"]["shard_tokens"]
        self._open()

    def _open(self) -> None:
        """Open the last shard, truncated to the noted length."""
        path = self._folder / f"{self._name}-{len(self._written.shards):05d}.bin"
        size = self._written.open_tokens * self._dtype.itemsize
        if size and (not path.exists() or path.stat().st_size < size):
            raise UserError(f"{path} is shorter than the noted length; {AGAIN}")
        self._file = open(path, "ab")  # noqa: SIM115 (`close` closes it)
        self._file.truncate(size)

    def append(self, tokens: np.ndarray, num_bytes: int, ends: bool) -> None:
        """Append a document or a piece; `tokens` include the end of text if `ends`."""
        self._file.write(tokens.tobytes())
        self._written.tokens += len(tokens)
        self._written.bytes += num_bytes
        self._written.documents += ends
        if ends and self._written.open_tokens >= self._shard_tokens:
            self._end_shard()
            self._open()

    def flush(self) -> None:
        """Bring all appended tokens onto the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the open shard, to be continued later."""
        self._file.close()

    def finish(self) -> None:
        """End the open shard, or remove an empty open shard."""
        if self._written.open_tokens:
            self._end_shard()
        else:
            self._file.close()
            Path(self._file.name).unlink()

    def _end_shard(self) -> None:
        """Write the document boundaries of the open shard, and note the checksum."""
        self.flush()
        self._file.close()
        path = Path(self._file.name)
        tokens = self._written.open_tokens
        checksum, bounds = scan(path, self._dtype, self._end_of_text)
        with whole(index_file(path)) as partial, open(partial, "wb") as file:
            np.save(file, bounds)
        self._written.shards.append(
            {
                "file": path.name,
                "tokens": tokens,
                "documents": len(bounds) - 1,
                "checksum": checksum,
            }
        )


class CorpusWriter:
    """Writes encoded records to the splits of a corpus, and the progress to a journal.

    In a folder with a journal, the writer continues after the noted progress and cuts off later
    data.
    """

    def __init__(self, folder: Path, header: dict[str, Any], stop_on_error: bool) -> None:
        self._folder, self._header, self._stop_on_error = folder, header, stop_on_error
        journal = folder / JOURNAL
        self.state, self._begun = State(), time.time_ns()
        if journal.exists():
            self.state = read_json(journal, lambda found: State.load(found["state"]), AGAIN)
            self._begun = read_json(journal, begun_of, AGAIN)
        self._write_journal()
        with ExitStack() as files:
            self._list = files.enter_context(open(folder / SKIPPED, "ab"))
            self._list.truncate(self.state.listed)
            self._writers = {
                name: files.enter_context(closing(SplitWriter(folder, name, header, written)))
                for name, written in self.state.splits.items()
            }
            self._files = files.pop_all()

    def add(self, records: Iterable[Encoded], part: int, number: int) -> list[str]:
        """Write the records up to record `number` of part `part`; return the problems.

        Raises:
            UserError: at the first problem under `on_error="stop"`.
        """
        problems = []
        for record in records:
            if record.problem:
                problems.append(f"{record.place}: {record.problem}")
                self._skip(problems[-1])
            elif len(record.tokens):
                self._writers[record.split].append(record.tokens, record.num_bytes, record.ends)
            else:
                self.state.empty += 1
        self.state.part, self.state.records = part, number
        if time.monotonic() - self._saved >= JOURNAL_SECONDS:
            self._save()
        return problems

    def _skip(self, problem: str) -> None:
        if self._stop_on_error:
            raise UserError(
                f"{problem}; run the same command with --on-error skip to leave out the record, "
                "or mend the source and start again with --overwrite"
            )
        self.state.broken += 1
        # The name of a file may be no UTF-8.
        line = f"{problem}\n".encode(errors="backslashreplace")
        self.state.listed += self._list.write(line)

    def _save(self) -> None:
        self._list.flush()
        for writer in self._writers.values():
            writer.flush()
        self._write_journal()

    def _write_journal(self) -> None:
        content = {"header": self._header, "begun": self._begun, "state": asdict(self.state)}
        write_json(self._folder / JOURNAL, content)
        self._saved = time.monotonic()

    def close(self) -> None:
        """Close all files, to be continued later."""
        self._files.close()

    def finish(self) -> None:
        """End all shards and write the manifest; a `UserError` for a corpus without documents."""
        if not any(written.documents for written in self.state.splits.values()):
            raise UserError("the sources have no text; give other sources, with --overwrite")
        for writer in self._writers.values():
            writer.finish()
        self.close()
        splits = {name: asdict(written) for name, written in self.state.splits.items()}
        manifest = {
            **self._header,
            "tokenizer": {**self._header["tokenizer"], "file": tokenizer_checksum(self._folder)},
            "splits": splits,
            "skipped": {"broken": self.state.broken, "empty": self.state.empty},
        }
        manifest["checksum"] = checksum_of(manifest)
        if not self.state.listed:
            (self._folder / SKIPPED).unlink()
        write_json(self._folder / MANIFEST, manifest)
        (self._folder / JOURNAL).unlink(missing_ok=True)
