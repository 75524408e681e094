"""The results of a benchmark: a JSON file and a file of parameters per model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from os.path import lexists
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import save_file

from dape import strict
from dape.chomsky.benchmark import Benchmark, differences
from dape.chomsky.encoder import Encoder, Model, build, configure
from dape.chomsky.tasks import resolve
from dape.errors import UserError, first_line
from dape.files import read_json, read_tensors, whole, write_json
from dape.provenance import Provenance
from dape.strict import Holds, Number

FORMAT = 2
_Training = Annotated[dict[str, Any], Holds({"length": int})]
Settings = Annotated[
    dict[str, Any],
    Holds({"model": dict[str, Any], "training": _Training, "evaluation": dict[str, Any]}),
]


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
    settings: Settings
    parameters: int
    loss: list[tuple[int, Number]]
    accuracy: list[float]
    seconds: dict[str, float]
    models: int
    provenance: Provenance
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
    def score_within(self) -> float:
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
        UserError: for a missing or damaged file, or another format.
    """
    if not lexists(file):
        raise UserError(f"{file} is missing; train it by `dape chomsky train`")
    return read_json(file, _build, "remove the file and train again")


def finished(benchmark: Benchmark, task: str, scheme: str, seed: int) -> Cell | None:
    """Return a cell of a benchmark, or None.

    Raises:
        UserError: for a cell with other settings, naming the changed settings.
    """
    file = path(benchmark.folder, task, scheme, seed)
    if not lexists(file):
        return None
    cell = load(file)
    if (cell.task, cell.scheme, cell.seed) != (task, scheme, seed):
        raise UserError(
            f"{file} is the cell of {cell.task}, {cell.scheme}, seed {cell.seed}; remove the file"
            " and train again"
        )
    changed = differences(cell.settings, benchmark.settings())
    if changed:
        raise UserError(
            f"{file} was made with other settings: {', '.join(changed)}; take another --out, or"
            f" remove {benchmark.folder} and train again"
        )
    return cell


def _build(content: dict[str, Any]) -> Cell:
    if content.get("format") != FORMAT:
        raise UserError(f"the format is {content.get('format')!r}, not {FORMAT}")
    cell: Cell = strict.build(Cell, content)
    return cell


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
        UserError: for an untrained model, or absent or damaged parameters.
    """
    cell = load(path(folder, task, scheme, seed))
    file = weights(folder, task, scheme, seed)
    if not file.exists():
        raise UserError(f"{file} is missing; train the cell again to get the parameters")
    problem = resolve(task)
    config = configure(strict.build(Model, cell.settings["model"]), scheme, problem, cell.trained)
    encoder = build(config, len(problem.outputs), seed)
    parameters = read_tensors(file, "train the cell again")
    try:
        encoder.load_state_dict(parameters)
    except RuntimeError as error:
        reason = first_line(error)
        raise UserError(f"{file} has other tensors ({reason}); train the cell again") from None
    return encoder.eval()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
