"""What an evaluation leaves behind: a file of JSON in the folder of the run."""

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
_REMEDY = "run `dape eval` on it"
Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Targets:
    """The tokens an evaluation scores; two evaluations with equal targets can be compared.

    `data` is the checksum of the corpus, `block` the tokens of a block, `documents` the numbers of
    the documents in the split, `tokens` and `bytes` what was scored in each of them. `bytes` is
    None for a tokenizer whose tokens stand for no fixed number of them. With `bos` each window
    begins with the model's token for that instead of its first.
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
    """One model under one protocol.

    `refused` says why the model did not take windows of a length, for which there is no
    measurement.
    """

    subject: Subject
    targets: Targets
    measurements: list[Measurement]
    provenance: dict[str, Any]
    refused: dict[int, str] = field(default_factory=dict)
    format: int = field(default=FORMAT)

    @property
    def lengths(self) -> list[int]:
        """Return the window lengths, ascending, with those that were refused."""
        return sorted([*self.by_length, *self.refused])

    @property
    def by_length(self) -> dict[int, Measurement]:
        """Return the measurements by their length."""
        return {measurement.length: measurement for measurement in self.measurements}

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        save(path, self)


def load(path: Path) -> Evaluation:
    """Read what `Evaluation.save` wrote.

    Raises:
        UserError: naming the command to run, if there is no such file, or it is damaged or of
            another version.
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
    """Write a record, with the fields of its subject beside its own."""
    content = asdict(record)
    write_json(path, {**content.pop("subject"), **content})


def typed(cls: Callable[..., Record], values: dict[str, Any]) -> Record:
    """Return a dataclass; a `TypeError` for a field that is not of its type, whatever is in it."""
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
    """Return what `build` makes of the fields that `save` wrote, with the subject as one.

    Raises:
        UserError: with the remedy, if there is no such file, or it is damaged or of another format.
    """
    if not path.exists():
        raise UserError(f"{path}: no such {kind}; {remedy}")

    def built(content: dict[str, Any]) -> Record:
        if content.get("format") != form:
            raise UserError(f"no {kind} of format {form}")
        names = {each.name for each in fields(Subject)} & content.keys()
        subject = typed(Subject, {name: content.pop(name) for name in names})
        return build({**content, "subject": subject})

    return read_json(path, built, f"{remedy} again")
