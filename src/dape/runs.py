"""The folder of a run: the paths of the content, and the progress of the run."""

import json
import math
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import Annotated, Any

from dape.errors import UserError
from dape.files import read_json, read_text, read_yaml, write_json
from dape.strict import Holds, check_keys

_STEP = "step-"
_CONTEXT = "context"  # begins the name of a file of `dape eval context`
_LOSSES = ("loss", "validation_loss")
# Of a record and of metrics, what a later command reads; a run may lack some.
_FACTS = {
    "command": str,
    "device": str,
    "versions": dict[str, str],
    "data": Annotated[dict[str, Any], Holds({"path": str, "checksum": str})],
    "started": str,
    "base_weights": str,
    "step": int,
    "tokens": int,
    "seconds": float,
    **dict.fromkeys(_LOSSES, float),
}
# Of a recipe, what a later command reads.
_SETTINGS = {"data": str, "seed": int, "model": dict, "training": dict, "optimizer": dict}
_UNFINISHED = ".unfinished"
_REMEDY = "run the command of the run again, under another --name"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder written by `dape train` or `dape retrofit`; the folder need not exist yet."""

    path: Path

    def __str__(self) -> str:
        """Return the path, the name of the run in messages and records."""
        return str(self.path)

    def __fspath__(self) -> str:
        """Return the path: a run folder is accepted wherever a path is."""
        return str(self.path)

    @property
    def recipe(self) -> Path:
        """The recipe of the run."""
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        """The record of the run: machine, sources and last metrics."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """The metrics, a line of JSON per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The metrics for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model and the tokenizer, in the format of transformers."""
        return self.path / "model"

    @property
    def adapters(self) -> Path:
        """The trained adapters of a retrofit."""
        return self.path / "adapters"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` updates."""
        return self.checkpoints / f"{_STEP}{step:08d}"

    def evaluation(self, protocol: str, stride: int | None = None, split: str = "test") -> Path:
        """Return the file of an evaluation: `evaluation/sliding-64-validation.json`.

        The name leaves out the test split, the default.
        """
        parts = [protocol, str(stride or ""), "" if split == "test" else split]
        return self.path / "evaluation" / f"{'-'.join(filter(None, parts))}.json"

    def evaluations(self) -> list[Path]:
        """Return the files of all evaluations of perplexity."""
        files = _inside(self.path / "evaluation", "*.json")
        return [file for file in files if not file.name.startswith(_CONTEXT)]

    def context(self, split: str = "test") -> Path:
        """Return the file of a use of the context: `evaluation/context-validation.json`."""
        return self.evaluation(_CONTEXT, split=split)

    def retrieval(self, task: str) -> Path:
        """Return the file of a retrieval: `retrieval/passkey.json`."""
        return self.path / "retrieval" / f"{task}.json"

    def retrievals(self) -> list[Path]:
        """Return the files of all retrievals."""
        return _inside(self.path / "retrieval", "*.json")

    def harness(self, task: str, length: int) -> Path:
        """Return the file of a task of lm-eval: `harness/wikitext-512.json`."""
        return self.path / "harness" / f"{task}-{length}.json"

    @property
    def exists(self) -> bool:
        """Whether the folder has a recipe, possibly a damaged recipe."""
        return lexists(self.recipe)

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return bool(self.read_record().get("ended"))

    @property
    def data_checksum(self) -> str | None:
        """The checksum of the training corpus, None without a record of the corpus."""
        return self.read_record().get("data", {}).get("checksum")

    @property
    def is_retrofit(self) -> bool:
        """Whether the run began with a pretrained model."""
        return "base" in self.read_recipe()["model"]

    @property
    def has_model(self) -> bool:
        """Whether a trained model was saved."""
        return (self.model / "config.json").is_file()

    @property
    def has_result(self) -> bool:
        """Whether a trained model or trained adapters were saved."""
        return self.has_model or self.adapters.is_dir()

    def saved_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, the newest first."""
        return _inside(self.checkpoints, _STEP + "[0-9]" * 8)[::-1]

    @property
    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return next(iter(self.saved_checkpoints()), None)

    def read_recipe(self) -> dict[str, Any]:
        """Return the recipe as a mapping.

        Raises:
            UserError: for a missing or damaged recipe.
        """
        recipe = read_yaml(self.recipe, _REMEDY)
        try:
            check_keys(recipe, _SETTINGS)
        except UserError as error:
            raise UserError(f"{self.recipe} is damaged ({error}); {_REMEDY}") from None
        return recipe

    def read_record(self) -> dict[str, Any]:
        """Return the record, empty before the first entry.

        Raises:
            UserError: for a damaged record.
        """
        return read_json(self.record, _known, _REMEDY) if lexists(self.record) else {}

    def check_data(self, data: str, checksum: str, remedy: str) -> None:
        """Refuse a corpus in `data` unlike the training corpus, if the run has a record of it.

        Raises:
            UserError: with both checksums and the remedy.
        """
        before = self.data_checksum or checksum
        if checksum != before:
            raise UserError(
                f"{self} was trained on other data: {data} has checksum {checksum[:12]}, not"
                f" {before[:12]}; {remedy}"
            )

    def update_record(self, entries: dict[str, Any]) -> None:
        """Write entries into the record, over entries of the same name."""
        write_json(self.record, self.read_record() | entries)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the logged metrics, a mapping per line, without an incomplete last line.

        Raises:
            UserError: for any other damaged line.
        """
        if not lexists(self.metrics):
            return []
        lines = read_text(self.metrics, _REMEDY).split("\n")[:-1]  # the last line is incomplete
        try:
            logged = [_known(json.loads(line)) for line in lines]
            for each in logged:
                check_keys(each, {"step": int})
        except (AttributeError, RecursionError, ValueError) as error:
            raise UserError(f"{self.metrics} is damaged ({error}); {_REMEDY}") from None
        return logged


def _inside(folder: Path, pattern: str) -> list[Path]:
    """Return the paths in a folder, none if the folder is absent or removed meanwhile."""
    try:
        return sorted(folder.glob(pattern))
    except FileNotFoundError:
        return []


def _known(record: Any) -> dict[str, Any]:
    """Return the entries of a record or of a line of metrics, without facts that are null.

    A loss that is null is NaN.

    Raises:
        UserError: for a fact of another type.
    """
    losses = {name: math.nan for name in _LOSSES if record.get(name, 0) is None}
    known = {
        name: value
        for name, value in (record | losses).items()
        if name not in _FACTS or value is not None
    }
    check_keys(known, {name: kind for name, kind in _FACTS.items() if name in known})
    return known


def unfinished(file: Path) -> Path:
    """Return the file of the measurements so far, kept until the record in `file` is finished."""
    return file.with_suffix(_UNFINISHED)
