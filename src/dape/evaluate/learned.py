"""A, B and f(A, B) of a trained model for a query, over all earlier keys.

The record has the content of Figure 1 of Zheng et al., 2024, with numbers by head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int

from dape.data.shards import Corpus, Split
from dape.errors import UserError
from dape.evaluate.capture import attending, capture
from dape.evaluate.heads import Head, describe
from dape.evaluate.record import restore, save
from dape.evaluate.subject import Model, Subject
from dape.provenance import Provenance
from dape.strict import Number
from dape.text import counted

FORMAT = 1
SPANS = 256  # most spans of keys with a mean in a record
DIGITS = 5  # of a mean in a record


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a record: heads, and A, B and f(A, B) as means over spans of keys."""

    layer: int
    residual: bool
    scores: list[list[Number]]
    bias: list[list[Number]]
    change: list[list[Number]]
    heads: list[Head]


@dataclass(frozen=True, slots=True)
class LearnedRows:
    """The rows of a query in some layers of a model, and the numbers of all heads.

    `data` is the checksum of the corpus; the query is token `query` of the first `length` tokens of
    document `document`. `spans` holds the first key of every span and the end of the last span.
    """

    subject: Subject
    data: str
    split: str
    document: int
    length: int
    query: int
    far: int
    spans: list[int]
    layers: list[Layer]
    provenance: Provenance
    format: int = field(default=FORMAT)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        save(path, self)


def load(path: Path) -> LearnedRows:
    """Read a file of `LearnedRows.save`.

    Raises:
        UserError: naming the command to run, for a missing file or a file of another version.
    """
    kind, remedy = "record of learned rows", "run `dape plot learned` on a run"
    return restore(path, kind, FORMAT, remedy, LearnedRows)


def learned_rows(
    model: Model,
    corpus: Corpus,
    *,
    layers: Sequence[int] = (),
    length: int = 2048,
    query: int | None = None,
    document: int | None = None,
    split: str = "test",
    device: torch.device,
    provenance: Provenance,
) -> LearnedRows:
    """Return the record of a query of a model.

    Args:
        model: a run, or a folder or hub name of a DAPE model.
        corpus: the corpus of the text.
        layers: layers, counted from 0; by default the first, the middle and the last.
        length: tokens to read, from the beginning of the document.
        query: token of the recorded row, counted from 0; by default the last.
        document: number of the document in the split; by default the first long enough.
        split: split of the corpus.
        device: device of the model.
        provenance: provenance for the record.

    Far keys are at the training length or beyond, in a shorter text the farther half.

    Raises:
        UserError: for a document too short, an unknown layer or an unknown query.
    """
    part = corpus.split(split)
    document = choose_document(part, length, document)
    tokens = torch.from_numpy(part.document(document)[:length]).to(device)
    with model.loaded(device, length) as network:
        subject = model.subject(network)
        last = len(attending(network)) - 1
        rows = capture(network, tokens, layers or sorted({0, last // 2, last}), query)
    keys = rows[0].scores.shape[1]
    trained = model.train_length
    far = trained if trained and trained < keys else keys // 2
    spans = np.linspace(0, keys, min(SPANS, keys) + 1).astype(int)
    return LearnedRows(
        subject=subject,
        data=corpus.checksum,
        split=split,
        document=document,
        length=length,
        query=keys - 1,
        far=far,
        spans=spans.tolist(),
        layers=[
            Layer(
                layer=row.layer,
                residual=row.residual,
                scores=smooth(row.scores, spans),
                bias=smooth(row.bias, spans),
                change=smooth(row.change, spans),
                heads=describe(row, far),
            )
            for row in rows
        ],
        provenance=provenance,
    )


def choose_document(part: Split, length: int, document: int | None) -> int:
    """Return the number of a document with `length` tokens, by default the first.

    Raises:
        UserError: for a document too short, or an unknown number.
    """
    lengths = (part.document_lengths - 1).tolist()  # without the end of text
    count, longest = len(lengths), max(lengths)
    if length > longest:
        raise UserError(
            f"length {length}: the longest of the {counted(count, 'document')} of the split has"
            f" {longest} tokens; take a shorter length"
        )
    if document is None:
        return next(n for n, tokens in enumerate(lengths) if tokens >= length)
    if not 0 <= document < count:
        raise UserError(f"document {document} is not one of 0 to {count - 1}")
    if lengths[document] < length:
        raise UserError(
            f"document {document} has {lengths[document]} tokens, below the length {length}; leave "
            "--document out, or take a shorter length"
        )
    return document


def smooth(
    values: Float[np.ndarray, "heads keys"], spans: Int[np.ndarray, " edges"]
) -> list[list[float]]:
    """Return the means of heads over spans of keys, rounded."""
    sums = np.add.reduceat(values.astype(np.float64), spans[:-1], axis=1)
    return [[float(f"{x:.{DIGITS}g}") for x in line] for line in sums / np.diff(spans)]
