"""Writing a corpus, so that an interrupted run can be taken up where it stood."""

import os
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dape.data.encoding import Encoded
from dape.data.shards import MANIFEST, checksum_of, index_file, scan
from dape.errors import UserError
from dape.files import read_json, whole, write_json

JOURNAL = "progress.json"
SKIPPED = "skipped.txt"
AGAIN = "start again with --overwrite"
SPLITS = ("train", "validation", "test")
JOURNAL_SECONDS = 1.0  # how much work an interruption costs


@dataclass(slots=True)
class Written:
    """How far a split is written; tokens beyond those of the `shards` are in an open one."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)

    @property
    def open_tokens(self) -> int:
        """Tokens in the open shard."""
        return self.tokens - sum(shard["tokens"] for shard in self.shards)


@dataclass(slots=True)
class State:
    """How far a corpus is written; `records` of part number `part` are read, and all before it.

    `listed` is the length of the list of what was skipped, in bytes.
    """

    part: int = 0
    records: int = 0
    broken: int = 0
    empty: int = 0
    listed: int = 0
    splits: dict[str, Written] = field(default_factory=lambda: {name: Written() for name in SPLITS})

    @classmethod
    def load(cls, entry: dict[str, Any]) -> "State":
        """Return the state of which `entry` is the `asdict`."""
        splits = {name: Written(**written) for name, written in entry["splits"].items()}
        return cls(**{**entry, "splits": splits})


class SplitWriter:
    """Appends documents to the shards of a split, from where `written` says.

    A shard ends with the document that brings it to the wanted size; no document spans two.
    """

    def __init__(self, folder: Path, name: str, header: dict[str, Any], written: Written) -> None:
        self._folder, self._name, self._written = folder, name, written
        self._dtype = np.dtype(header["dtype"])
        self._end_of_text = header["tokenizer"]["end_of_text"]
        self._shard_tokens = header["options"]["shard_tokens"]
        self._open()

    def _open(self) -> None:
        """Open the last shard, cut back to what is noted of it."""
        path = self._folder / f"{self._name}-{len(self._written.shards):05d}.bin"
        size = self._written.open_tokens * self._dtype.itemsize
        if size and (not path.exists() or path.stat().st_size < size):
            raise UserError(f"{path} has lost what was written to it; {AGAIN}")
        self._file = open(path, "ab")  # noqa: SIM115 (`close` closes it)
        self._file.truncate(size)

    def append(self, tokens: np.ndarray, num_bytes: int, ends: bool) -> None:
        """Append a document, or a piece of one; `tokens` hold the end of text if it `ends`."""
        self._file.write(tokens.tobytes())
        self._written.tokens += len(tokens)
        self._written.bytes += num_bytes
        self._written.documents += ends
        if ends and self._written.open_tokens >= self._shard_tokens:
            self._end_shard()
            self._open()

    def flush(self) -> None:
        """Bring all that was appended onto the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the open shard as it is, to be continued."""
        self._file.close()

    def finish(self) -> None:
        """End the open shard, or remove it if it is empty."""
        if self._written.open_tokens:
            self._end_shard()
        else:
            self._file.close()
            Path(self._file.name).unlink()

    def _end_shard(self) -> None:
        """Write where the documents of the open shard begin and end, and note its checksum."""
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
    """Writes encoded records to the splits of a corpus, and a journal of how far it is.

    Opened on a folder with a journal it goes on from there: what was written later is cut off.
    """

    def __init__(self, folder: Path, header: dict[str, Any], stop_on_error: bool) -> None:
        self._folder, self._header, self._stop_on_error = folder, header, stop_on_error
        journal = folder / JOURNAL
        self.state = State()
        if journal.exists():
            self.state = read_json(journal, lambda found: State.load(found["state"]), AGAIN)
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
        """Write the records, after which `number` of part `part` are read; return what was wrong.

        Raises `UserError` at the first that is wrong, if asked to stop.
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
                f"{problem}; run the same command with --on-error skip to go on without it, "
                "or mend it and start again with --overwrite"
            )
        self.state.broken += 1
        self.state.listed += self._list.write(f"{problem}\n".encode())

    def _save(self) -> None:
        self._list.flush()
        for writer in self._writers.values():
            writer.flush()
        self._write_journal()

    def _write_journal(self) -> None:
        write_json(self._folder / JOURNAL, {"header": self._header, "state": asdict(self.state)})
        self._saved = time.monotonic()

    def close(self) -> None:
        """Close all files as they are, to be continued."""
        self._files.close()

    def finish(self) -> None:
        """End all shards and write the manifest; `UserError` if there is not one document."""
        if not any(written.documents for written in self.state.splits.values()):
            raise UserError("the sources have no text; name others, and start with --overwrite")
        for writer in self._writers.values():
            writer.finish()
        self.close()
        splits = {name: asdict(written) for name, written in self.state.splits.items()}
        manifest = {
            **self._header,
            "splits": splits,
            "skipped": {"broken": self.state.broken, "empty": self.state.empty},
        }
        manifest["checksum"] = checksum_of(manifest)
        if not self.state.listed:
            (self._folder / SKIPPED).unlink()
        write_json(self._folder / MANIFEST, manifest)
        (self._folder / JOURNAL).unlink(missing_ok=True)
