"""What an evaluation leaves behind: `RUN/evaluation/PROTOCOL.json`."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dape.errors import UserError
from dape.evaluate.perplexity import Measurement

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Targets:
    """The tokens an evaluation scores; two evaluations with equal targets can be compared.

    `data` is the checksum of the corpus, `block` the tokens of a block, `documents` the numbers of
    the documents in the split, `tokens` and `bytes` what was scored in each of them. With `bos`
    each window begins with the model's token for that instead of its first.
    """

    data: str
    split: str
    protocol: str
    block: int
    longest: int
    documents: list[int]
    tokens: list[int]
    bytes: list[int]
    bos: bool = False


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model under one protocol.

    `settings` is a checksum of the recipe without its seed: equal for runs that differ in nothing
    else. `seed` and `settings` are None for a model that no run of ours trained. `refused` says why
    the model did not take windows of a length, for which there is no measurement.
    """

    run: str
    scheme: str
    train_length: int | None
    seed: int | None
    settings: str | None
    parameters: int
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
        write(path, self)


def load(path: Path) -> Evaluation:
    """Read what `Evaluation.save` wrote.

    Raises `UserError` naming the command to run if there is none, or if another version wrote it.
    """
    content = read(path, "evaluation", FORMAT, "run `dape eval` on it")
    measurements = [
        Measurement(**{**each, "contexts": [tuple(bin) for bin in each["contexts"]]})
        for each in content["measurements"]
    ]
    refused = {int(length): reason for length, reason in content.get("refused", {}).items()}
    targets = Targets(**content["targets"])
    return Evaluation(
        **{**content, "targets": targets, "measurements": measurements, "refused": refused}
    )


def evaluation_path(run: Path, protocol: str, stride: int | None, split: str) -> Path:
    """Return where the evaluation of a run lies: `RUN/evaluation/sliding-64-validation.json`.

    The test split, being the usual one, is not named.
    """
    parts = [protocol, str(stride or ""), "" if split == "test" else split]
    return run / "evaluation" / f"{'-'.join(filter(None, parts))}.json"


def write(path: Path, record: Any) -> None:
    """Write a dataclass as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(record), indent=1) + "\n")
    os.replace(part, path)


def read(path: Path, kind: str, form: int, remedy: str) -> dict[str, Any]:
    """Return the fields of what `write` wrote.

    Raises `UserError` with the remedy if there is no such file, or of another format.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy} again") from None
    if not isinstance(content, dict) or content.get("format") != form:
        raise UserError(f"{path}: no {kind} of format {form}; {remedy} again")
    return content
