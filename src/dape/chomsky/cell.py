"""The results of a benchmark: a JSON file and a file of parameters per model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dape.chomsky.benchmark import Benchmark, differences
from dape.chomsky.encoder import Encoder, Model, build, configure
from dape.chomsky.tasks import resolve
from dape.errors import UserError
from dape.files import read_json, whole, write_json

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Cell:
    """A trained and tested model.

    settings: sections `model`, `training` and `evaluation` of the benchmark.
    loss: pairs of a step and the mean training loss since the previous pair, in nats a symbol.
    accuracy: percent of scored symbols right at the lengths 1, 2, ...
    seconds: `training` and `evaluation`, the time of models side by side, divided by their number.
    models: number of models trained side by side.
    """

    task: str
    scheme: str
    seed: int
    settings: dict[str, Any]
    parameters: int
    loss: list[tuple[int, float]]
    accuracy: list[float]
    seconds: dict[str, float]
    models: int
    provenance: dict[str, Any]
    format: int = field(default=FORMAT)

    @property
    def trained(self) -> int:
        """Return the longest training input."""
        return int(self.settings["training"]["length"])

    @property
    def score(self) -> float:
        """Return the mean accuracy over the lengths beyond training."""
        return _mean(self.accuracy[self.trained :])

    @property
    def learned(self) -> float:
        """Return the mean accuracy over the lengths of training, on new examples."""
        return _mean(self.accuracy[: self.trained])

    def save(self, folder: Path) -> None:
        """Write the file into the folder of a benchmark, whole or not at all."""
        write_json(path(folder, self.task, self.scheme, self.seed), asdict(self))


def path(folder: Path, task: str, scheme: str, seed: int) -> Path:
    """Return the path of a cell in the folder of a benchmark."""
    return folder / "cells" / task / f"{scheme}-{seed}.json"


def load(file: Path) -> Cell:
    """Return the cell in a file.

    Raises:
        UserError: for a file that is not a cell, or of another format.
    """
    return read_json(file, _build, "remove the file and train again")


def finished(benchmark: Benchmark, task: str, scheme: str, seed: int) -> Cell | None:
    """Return a cell of a benchmark, or None.

    Raises:
        UserError: for a cell with other settings, naming the changed settings.
    """
    file = path(benchmark.folder, task, scheme, seed)
    if not file.exists():
        return None
    cell = load(file)
    changed = differences(cell.settings, benchmark.settings())
    if changed:
        raise UserError(
            f"{file} was made with other settings: {', '.join(changed)}; take another --out"
        )
    return cell


def _build(content: dict[str, Any]) -> Cell:
    if content["format"] != FORMAT:
        raise UserError(f"the format is {content['format']}, not {FORMAT}")
    return Cell(**{**content, "loss": [(step, loss) for step, loss in content["loss"]]})


def weights(folder: Path, task: str, scheme: str, seed: int) -> Path:
    """Return the path of a model's parameters in the folder of a benchmark."""
    return folder / "models" / task / f"{scheme}-{seed}.safetensors"


def save_weights(file: Path, parameters: dict[str, torch.Tensor]) -> None:
    """Write parameters, whole or not at all."""
    with whole(file) as partial:
        save_file({name: p.contiguous().cpu() for name, p in parameters.items()}, partial)


def load_model(folder: Path, task: str, scheme: str, seed: int) -> Encoder:
    """Return a trained encoder.

    Raises:
        UserError: for an untrained model, or absent parameters.
    """
    cell = load(path(folder, task, scheme, seed))
    file = weights(folder, task, scheme, seed)
    if not file.exists():
        raise UserError(f"{file} is missing; train the cell again to get the parameters")
    problem = resolve(task)
    config = configure(Model(**cell.settings["model"]), scheme, problem, cell.trained)
    encoder = build(config, len(problem.outputs), seed)
    encoder.load_state_dict(load_file(file))
    return encoder.eval()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
