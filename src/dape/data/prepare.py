"""Preparing a corpus: sources to records to tokens to shards, resumable after any interruption."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from dape.data import tokenizer as tokenizers
from dape.data.corpora import STANDARD_LIBRARY, TEXT, Part, Source, resolve
from dape.data.encoding import Batch, Encoding, encoded
from dape.data.records import Record, read
from dape.data.shards import FORMAT, MANIFEST, TOKENIZER, Corpus
from dape.data.writer import AGAIN, JOURNAL, SKIPPED, SPLITS, CorpusWriter, State, begun_of
from dape.errors import UserError
from dape.files import is_free, locked, read_json, remove_leftovers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 2**20  # bytes of source for a worker at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Turn text into tokens: memory-mapped shards with document boundaries, and a manifest."""

    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="SOURCE...")] = (STANDARD_LIBRARY,)
    """files, folders, Hugging Face datasets (NAME or NAME:CONFIGURATION), or python-stdlib"""
    out: Path
    """folder to write; an interrupted preparation resumes"""
    tokenizer: str = "byte"
    """byte, gpt2, or a folder with a tokenizer.json"""
    text_key: str = TEXT
    """key of the text in JSON lines, and column of the text in a dataset"""
    validation: float = 0.1
    """fraction of the documents for validation, if the source has no splits"""
    test: float = 0.1
    """fraction of the documents for test, if the source has no splits"""
    on_error: Literal["stop", "skip"] = "stop"
    """stop at an unreadable line or file, or skip, count and list unreadable lines and files"""
    workers: int = os.cpu_count() or 1
    """number of tokenizing processes, without effect on the result"""
    shard_tokens: int = 2**27
    """tokens of a shard, up to the end of the last document"""
    overwrite: bool = False
    """replace an earlier preparation in the folder"""

    def __post_init__(self) -> None:
        if not (self.validation >= 0 and self.test >= 0 and self.validation + self.test < 1):
            raise UserError(
                f"validation {self.validation} and test {self.test} must be fractions of at "
                "least 0, with a sum below 1"
            )
        if "" in self.sources:  # an unset variable of a shell, and no name of the present folder
            raise UserError("source '' has no name; give a file, a folder or a dataset")
        twice = next((name for name in self.sources if self.sources.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"source {twice!r} is given twice; leave out the second")
        for name in ("workers", "shard_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")


@dataclass(frozen=True, slots=True)
class Status:
    """The progress of a preparation: bytes of source read, bytes of text and tokens written.

    `problems` lists the problems since the last status, with file and line.
    """

    source_bytes: int
    text_bytes: int
    tokens: int
    problems: list[str]

    @classmethod
    def of(cls, state: State, source_bytes: int, problems: list[str]) -> "Status":
        """Return the status of a corpus in the writer's `state`."""
        text_bytes = sum(split.bytes for split in state.splits.values())
        tokens = sum(split.tokens for split in state.splits.values())
        return cls(source_bytes, text_bytes, tokens, problems)


class Preparation:
    """The preparation of a corpus, `finished` for a whole corpus, `resumed` for an interrupted one.

    Raises:
        UserError: for an unknown source or tokenizer, or a folder with other files or with a
            preparation by other arguments.
    """

    def __init__(self, options: Options) -> None:
        self._options, self._folder = options, options.out
        _refuse_inside(options)
        sources = [resolve(name, options.text_key) for name in options.sources]
        _refuse_overlap(sources)
        self._parts = [part for source in sources for part in source.parts]
        self._tokenizer = tokenizers.load(options.tokenizer)
        self._header = _header(options, sources, self._tokenizer)
        self._busy = f"another process is preparing {self._folder}; wait for the end"
        try:
            self._look()
        except UserError as error:
            self._look_alone(error)
        if self.finished:
            self._tidy()

    def _look_alone(self, error: UserError) -> None:
        """Look under the lock, because another process may be the cause of an error."""
        try:
            with locked(self._folder, self._busy):
                self._look()
        except OSError:  # a folder that cannot be written
            raise error from None

    def _tidy(self) -> None:
        """Remove what a process left that was killed at the very end."""
        with suppress(OSError, UserError), locked(self._folder, self._busy):
            if (self._folder / MANIFEST).is_file():  # no other process has begun anew
                (self._folder / JOURNAL).unlink(missing_ok=True)
            remove_leftovers(self._folder)

    def _look(self) -> None:
        """Note what the folder holds, and refuse a folder of other files or arguments."""
        manifest, journal = self._folder / MANIFEST, self._folder / JOURNAL
        self.finished = manifest.is_file() and not self._options.overwrite
        self.resumed = journal.is_file() and not self._options.overwrite and not self.finished
        if self.finished:
            Corpus(self._folder)  # refuses a damaged corpus
            there = read_json(manifest, _arguments, AGAIN)
            _refuse_other(self._folder, there, self._header)
        elif self.resumed:
            there = read_json(journal, lambda found: _arguments(found["header"]), AGAIN)
            _refuse_other(self._folder, there, self._header)
            _refuse_changed(self._parts, journal)
        elif not (manifest.is_file() or journal.is_file() or is_free(self._folder)):
            found = "is no folder" if self._folder.is_file() else "holds other files"
            raise UserError(f"{self._folder} {found}; give --out a new or empty folder")

    @property
    def source_bytes(self) -> int | None:
        """Bytes of all sources, None if a size is unknown."""
        return None if any(part.size is None for part in self._parts) else _size(self._parts)

    def run(self) -> Iterator[Status]:
        """Write the corpus, or the remainder after an interruption.

        Yields a status at the start and after each batch.

        Raises:
            UserError: for a folder in use by another process, or prepared meanwhile by other
                arguments, or at the first problem under `on_error="stop"`.
        """
        options = self._options
        with ExitStack() as stack:
            stack.enter_context(locked(self._folder, self._busy))
            remove_leftovers(self._folder)
            if options.overwrite:
                _clear(self._folder)
            else:
                self._look()  # another process may have prepared meanwhile, from other arguments
            if self.finished:
                yield Status(_size(self._parts), 0, 0, [])
                return
            stop = options.on_error == "stop"
            writer = stack.enter_context(closing(CorpusWriter(self._folder, self._header, stop)))
            part, done = writer.state.part, writer.state.records
            yield Status.of(writer.state, _size(self._parts[:part]), [])
            batches = _batches(self._parts, part, done)
            for batch, records in encoded(batches, self._encoding(), self._workers()):
                problems = writer.add(records, batch.part, batch.number)
                yield Status.of(writer.state, batch.source_bytes, problems)
            self._tokenizer.save_pretrained(self._folder / TOKENIZER)
            writer.finish()

    def _workers(self) -> int:
        """Return the number of processes worthwhile for the remaining text."""
        if self.source_bytes is None:
            return self._options.workers
        return min(self._options.workers, 1 + self.source_bytes // BATCH)

    def _encoding(self) -> Encoding:
        return Encoding(
            tokenizers.serialize(self._tokenizer),
            self._tokenizer.eos_token_id,
            self._header["dtype"],
            self._options.validation,
            self._options.test,
        )


def _header(
    options: Options, sources: list[Source], tokenizer: "PreTrainedTokenizerFast"
) -> dict[str, Any]:
    """Return the manifest before reading, equal for equal arguments."""
    size = tokenizers.vocab_size(tokenizer)
    return {
        "format": FORMAT,
        "tokenizer": {
            "name": options.tokenizer,
            "vocab_size": size,
            "end_of_text": tokenizer.eos_token_id,
            "fingerprint": tokenizers.fingerprint(tokenizer),
        },
        "dtype": "uint16" if size <= 2**16 else "uint32",
        "sources": [source.describe() for source in sources],
        "options": {
            "validation": options.validation,
            "test": options.test,
            "shard_tokens": options.shard_tokens,
            "text_key": options.text_key,
        },
    }


def _refuse_other(folder: Path, was: dict[str, tuple[str, Any]], wanted: dict[str, Any]) -> None:
    """Raise a `UserError` for a folder prepared with other arguments."""
    now = _arguments(wanted)
    differences = [
        f"{name} {was[name][0]} {'changed since' if was[name][0] == text else f'is now {text}'}"
        for name, (text, value) in now.items()
        if was[name][1] != value
    ]
    if differences:
        raise UserError(
            f"{folder} was prepared from other arguments ({'; '.join(differences)}); "
            "give the earlier arguments, another --out, or --overwrite to replace the corpus"
        )


def _arguments(header: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the arguments that decide the content: shown text and identity of each."""
    sources, tokenizer = header["sources"], header["tokenizer"]
    return {
        "sources": (
            " ".join(source["name"] for source in sources),
            [source["fingerprint"] for source in sources],
        ),
        "tokenizer": (tokenizer["name"], tokenizer["fingerprint"]),
        # Manifests of earlier versions lack the key.
        **{
            name: (str(value), value)
            for name, value in {"text_key": TEXT, **header["options"]}.items()
        },
    }


def _refuse_changed(parts: list[Part], journal: Path) -> None:
    """Raise a `UserError` for a file changed since the beginning, of which a half may be read.

    The time of the status tells: a file moved or copied here keeps the time of its content.
    """
    begun = read_json(journal, begun_of, AGAIN) or journal.stat().st_mtime_ns
    for path in (Path(part.location) for part in parts):
        if path.is_file() and path.stat().st_ctime_ns > begun:
            raise UserError(f"{path} changed since the preparation began; {AGAIN}")


def _refuse_inside(options: Options) -> None:
    """Raise a `UserError` for a corpus inside its own source."""
    for name in options.sources:
        folder = Path(name).expanduser()
        inside = options.out.resolve().is_relative_to(folder.resolve())
        if name != STANDARD_LIBRARY and folder.is_dir() and inside:
            raise UserError(f"{options.out} lies in the source {name}; name a folder outside")


def _refuse_overlap(sources: list[Source]) -> None:
    """Raise a `UserError` for a file in two sources."""
    owners: dict[str, str] = {}
    for source in sources:
        for part in source.parts:
            owner = owners.setdefault(os.path.realpath(part.location), source.name)
            if owner != source.name:
                raise UserError(
                    f"sources {owner} and {source.name} both have {part.location}; leave out"
                    " one of the sources"
                )


def _clear(folder: Path) -> None:
    """Remove the files of a preparation, and nothing else."""
    shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    for name in SPLITS:
        for path in (*folder.glob(f"{name}-*.bin"), *folder.glob(f"{name}-*.idx.npy")):
            path.unlink()
    for name in (SKIPPED, MANIFEST, JOURNAL):
        (folder / name).unlink(missing_ok=True)


def _size(parts: list[Part]) -> int:
    return sum(part.size or 0 for part in parts)


def _batches(parts: list[Part], first: int, skip: int) -> Iterator[Batch]:
    """Yield batches of about `BATCH` bytes, after the first `skip` records of part `first`."""
    before = _size(parts[:first])
    records: list[Record] = []
    size = 0
    for index, part in enumerate(parts[first:], first):
        done = skip if index == first else 0
        for number, record in enumerate(read(part, done), done + 1):
            records.append(record)
            size += len(record.raw)
            if size >= BATCH:
                yield Batch(records, index, number, before + record.source_bytes)
                records, size = [], 0
        before += part.size or 0
    if records:
        yield Batch(records, index, number, before)
