"""From records to tokens, in one process or many, always in the order of the records."""

import json
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing import get_context, parent_process
from threading import Thread

import numpy as np

from dape.data.records import Record
from dape.data.tokenizer import encoder
from dape.errors import UserError


@dataclass(frozen=True, slots=True)
class Encoding:
    """Settings to encode a record; `validation` and `test` are fractions of the documents."""

    tokenizer: str
    end_of_text: int
    dtype: str
    validation: float
    test: float


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a record, with the end of text if its document ends; none for empty text.

    `num_bytes` is the length of the text in UTF-8; `problem` says why there is no text.
    """

    place: str
    split: str
    tokens: np.ndarray
    num_bytes: int
    ends: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Records to encode together; after them, `number` records of part number `part` are read.

    `source_bytes` is how many bytes of all sources have been read.
    """

    records: list[Record]
    part: int
    number: int
    source_bytes: int


class Encoder:
    """Encodes batches of records as an `Encoding` says."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._tokenize = encoder(encoding.tokenizer)

    def __call__(self, records: list[Record]) -> list[Encoded]:
        """Return one `Encoded` a record."""
        return [self._encode(record) for record in records]

    def _encode(self, record: Record) -> Encoded:
        try:
            if record.problem:
                raise ValueError(record.problem)
            text = _text(record)
            content = text.encode()
        except (ValueError, RecursionError) as error:
            nothing = np.empty(0, self._encoding.dtype)
            return Encoded(record.place, "", nothing, 0, record.ends, str(error))
        identity = record.part.key.encode() if record.part.kind == "text" else content
        split = record.part.split or assigned_split(
            identity, self._encoding.validation, self._encoding.test
        )
        end = [self._encoding.end_of_text] if record.ends and text else []
        parts = [self._tokenize(text), np.array(end, self._encoding.dtype)]
        tokens = np.concatenate(parts, dtype=self._encoding.dtype, casting="unsafe")
        return Encoded(record.place, split, tokens, len(content), record.ends)


def _text(record: Record) -> str:
    if record.part.kind != "json":
        return record.raw.decode()
    try:
        document = json.loads(record.raw)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    key = record.part.text_key
    if not isinstance(document, dict) or not isinstance(document.get(key), str):
        raise ValueError(f'not an object with a string "{key}"; --text-key names another')
    return document[key]


def assigned_split(identity: bytes, validation: float, test: float) -> str:
    """Return the split of a document without a named one: a function of its identity alone."""
    share = int.from_bytes(blake2b(identity, digest_size=8).digest()) / 2**64
    if share < validation:
        return "validation"
    return "test" if share < validation + test else "train"


def encoded(
    batches: Iterable[Batch], encoding: Encoding, workers: int
) -> Iterator[tuple[Batch, list[Encoded]]]:
    """Yield each batch with its encoded records, in order, computed by `workers` processes.

    At most two batches a worker are in memory. Raises `UserError` if a worker is killed.
    """
    if workers == 1:
        encode = Encoder(encoding)
        yield from ((batch, encode(batch.records)) for batch in batches)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoding,))
    pending: deque[tuple[Batch, Future[list[Encoded]]]] = deque()
    try:
        for batch in batches:
            pending.append((batch, pool.submit(_encode_in_worker, batch.records)))
            if len(pending) == 2 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        yield from ((batch, future.result()) for batch, future in pending)
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} workers was killed, perhaps for its memory; "
            "run the same command again to resume, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(encoding: Encoding) -> None:
    """Load the tokenizer, leave Ctrl-C to the parent, and end when the parent is gone."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(encoding)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _encode_in_worker(records: list[Record]) -> list[Encoded]:
    return _encoder(records)


_encoder: Encoder
