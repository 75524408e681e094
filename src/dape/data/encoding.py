"""From records to tokens, in any number of processes, in the order of the records."""

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
from dape.data.tokenizer import encode_later, encoder
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
    """The tokens of a source record, with the end of text after a document.

    `num_bytes` is the length of the text in UTF-8. `problem` explains an absent text.
    """

    place: str
    split: str
    tokens: np.ndarray
    num_bytes: int
    ends: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Records to encode together. Afterwards, `number` records of part number `part` are read.

    `source_bytes` counts the bytes read so far, over all sources.
    """

    records: list[Record]
    part: int
    number: int
    source_bytes: int


class Encoder:
    """Encodes batches of records with the settings of an `Encoding`."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._tokenize = encoder(encoding.tokenizer)

    def __call__(self, records: list[Record]) -> list[Encoded]:
        """Return an `Encoded` per record.

        Raises:
            UserError: for a text with the token of the end of text. A tokenizer of words reads
                " </s> " so.
        """
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
        identity = os.fsencode(record.part.key) if record.part.kind == "text" else content
        split = record.part.split or assigned_split(
            identity, self._encoding.validation, self._encoding.test
        )
        end_of_text = self._encoding.end_of_text
        found = self._tokenize(text) if record.begins else encode_later(self._tokenize, text)
        if end_of_text in found:
            raise UserError(
                f"{record.place}: the tokenizer reads the end of text in ordinary text, where the "
                "document would be cut; use another tokenizer, or take the words out of the text"
            )
        end = [end_of_text] if record.ends and text else []
        parts = [found, np.array(end, self._encoding.dtype)]
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
        raise ValueError(f'not an object with a string "{key}"; give another --text-key')
    return document[key]


def assigned_split(identity: bytes, validation: float, test: float) -> str:
    """Return the split of a document without a named split, from the document's identity alone."""
    share = int.from_bytes(blake2b(identity, digest_size=8).digest()) / 2**64
    if share < validation:
        return "validation"
    return "test" if share < validation + test else "train"


def encoded(
    batches: Iterable[Batch], encoding: Encoding, workers: int
) -> Iterator[tuple[Batch, list[Encoded]]]:
    """Yield batches with their encoded records, in order, computed by `workers` processes.

    At most two batches per worker are in memory.

    Raises:
        UserError: if a worker is killed.
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
            f"a worker of {workers} was killed, perhaps for lack of memory; "
            "run the same command again to resume, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(encoding: Encoding) -> None:
    """Load the tokenizer, leave Ctrl-C to the parent, and end after the parent."""
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
