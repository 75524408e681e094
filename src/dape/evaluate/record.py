"""Records of evaluations: JSON files in the run folder."""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from dape import strict
from dape.errors import UserError
from dape.evaluate.perplexity import Measurement
from dape.evaluate.subject import Subject
from dape.files import read_json, write_json
from dape.provenance import Provenance

FORMAT = 1
_REMEDY = "run `dape eval` on the model"
Record = TypeVar("Record")


@runtime_checkable
class Recorded(Protocol):
    """A record of a measurement."""

    @property
    def subject(self) -> Subject:
        """The model."""

    @property
    def provenance(self) -> Provenance:
        """Command, commit, versions and device."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The scored tokens of an evaluation; evaluations with equal targets are comparable.

    Attributes:
        data: checksum of the corpus.
        split: split of the corpus.
        protocol: name of the protocol.
        block: tokens of a block.
        longest: tokens of the longest window.
        documents: numbers of the scored documents in the split.
        tokens: number of scored tokens by document.
        bytes: scored bytes by document, or None if tokens have no fixed number of bytes.
        bos: whether a window begins with the model's token for the beginning of a text.
    """

    data: str
    split: str
    protocol: str
    block: int
    longest: int
    documents: list[int]
    tokens: list[int]
    bytes: list[int] | None
    bos: bool = False

    def __post_init__(self) -> None:
        """Refuse counts that are not one for each document."""
        for name in ("tokens", "bytes"):
            counts = getattr(self, name)
            if counts is not None and len(counts) != len(self.documents):
                raise UserError(f"{name} has {len(counts)} counts for {len(self.documents)}")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The perplexity of a model over length, under a protocol.

    Attributes:
        subject: the model.
        targets: the scored tokens.
        measurements: a measurement per length.
        provenance: command, commit, versions and device.
        refused: the reason for each refused length.
        format: version of the file format.
    """

    subject: Subject
    targets: Targets
    measurements: list[Measurement]
    provenance: Provenance
    refused: dict[int, str] = field(default_factory=dict)
    format: int = field(default=FORMAT)

    def __post_init__(self) -> None:
        """Refuse numbers of other documents than those of the targets."""
        for each in self.measurements:
            if len(each.document_losses) != len(self.targets.documents):
                raise UserError(f"document_losses of length {each.length} has not each document")
            if not math.isfinite(each.loss):  # without the numbers that follow from the loss
                continue
            if (each.bits_per_byte is None) != (self.targets.bytes is None):
                raise UserError(f"bits_per_byte of length {each.length} without bytes, or none")
            if (each.loss_error is None) != (len(each.document_losses) == 1):
                raise UserError(f"loss_error of length {each.length} is that of other documents")

    @property
    def lengths(self) -> list[int]:
        """Return the window lengths, ascending, refused lengths included."""
        return sorted([*self.by_length, *self.refused])

    @property
    def by_length(self) -> dict[int, Measurement]:
        """Return the measurements by length."""
        return {measurement.length: measurement for measurement in self.measurements}

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        save(path, self)


def load(path: Path) -> Evaluation:
    """Read a file of `Evaluation.save`.

    Raises:
        UserError: naming the command to run, for a file that is missing, damaged or of another
            version.
    """
    return restore(path, "evaluation", FORMAT, _REMEDY, Evaluation)


def save(path: Path, record: Any) -> None:
    """Write a record, with the fields of the subject at the top level."""
    content = asdict(record)
    write_json(path, {**content.pop("subject"), **content})


def restore(path: Path, kind: str, form: int, remedy: str, cls: type[Record]) -> Record:
    """Return the record of a class in a file of `save`.

    Raises:
        UserError: with the remedy, for a file that is missing, damaged or of another format.
    """
    if not path.exists():
        raise UserError(f"{path}: the {kind} is missing; {remedy}")

    def built(content: dict[str, Any]) -> Record:
        if content.get("format") != form:
            raise UserError(f"the file holds no {kind} of format {form}")
        names = {each.name for each in fields(Subject)} & content.keys()
        subject = strict.build(Subject, {name: content.pop(name) for name in names})
        _check(subject)
        record: Record = strict.build(cls, {**content, "subject": subject})
        return record

    return read_json(path, built, f"{remedy} again")


def _check(subject: Subject) -> None:
    """Raise a `UserError` for a run without a seed or a length, and for another model's seed."""
    if (subject.seed is None) != (subject.settings is None):
        raise UserError("a run has a seed and settings, another model neither")
    if subject.settings is not None and subject.train_length is None:
        raise UserError("a run has a train_length")
