"""Records of evaluations: JSON files in the run folder."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from dape.errors import UserError
from dape.evaluate.perplexity import Measurement
from dape.evaluate.subject import Subject
from dape.files import read_json, write_json

FORMAT = 1
_REMEDY = "run `dape eval` on the model"
Record = TypeVar("Record")


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
    provenance: dict[str, Any]
    refused: dict[int, str] = field(default_factory=dict)
    format: int = field(default=FORMAT)

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
    return restore(path, "evaluation", FORMAT, _REMEDY, _evaluation)


def _evaluation(content: dict[str, Any]) -> Evaluation:
    measurements = [
        typed(Measurement, {**each, "contexts": [tuple(bin) for bin in each["contexts"]]})
        for each in content["measurements"]
    ]
    refused = {int(length): reason for length, reason in content.get("refused", {}).items()}
    targets = typed(Targets, content["targets"])
    return Evaluation(
        **{**content, "targets": targets, "measurements": measurements, "refused": refused}
    )


def save(path: Path, record: Any) -> None:
    """Write a record, with the fields of the subject at the top level."""
    content = asdict(record)
    write_json(path, {**content.pop("subject"), **content})


def typed(cls: Callable[..., Record], values: dict[str, Any]) -> Record:
    """Return a dataclass; a `TypeError` for a field of a wrong type, at any depth."""
    for name, hint in get_type_hints(cls).items():
        options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds = {get_origin(option) or option for option in options}
        if float in kinds:
            kinds.add(int)
        if name in values and type(values[name]) not in kinds:
            raise TypeError(f"{name} is {values[name]!r}")
    return cls(**values)


def restore(
    path: Path, kind: str, form: int, remedy: str, build: Callable[[dict[str, Any]], Record]
) -> Record:
    """Return `build(fields)` for a file of `save`, with the subject as a field.

    Raises:
        UserError: with the remedy, for a file that is missing, damaged or of another format.
    """
    if not path.exists():
        raise UserError(f"{path}: the {kind} is missing; {remedy}")

    def built(content: dict[str, Any]) -> Record:
        if content.get("format") != form:
            raise UserError(f"no {kind} of format {form}")
        names = {each.name for each in fields(Subject)} & content.keys()
        subject = typed(Subject, {name: content.pop(name) for name in names})
        return build({**content, "subject": subject})

    return read_json(path, built, f"{remedy} again")
