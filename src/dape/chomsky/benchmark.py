"""The benchmark as data: which tasks, schemes and seeds, and how each model is built and scored."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dape import strict
from dape.chomsky.encoder import Model, configure
from dape.chomsky.measure import Evaluation
from dape.chomsky.stack import Training
from dape.chomsky.tasks import TASKS, resolve
from dape.errors import UserError, check_finite, check_whole
from dape.files import read_yaml, shipped
from dape.positions import scheme as schemes
from dape.positions.absolute import Learned
from dape.positions.rotary import RandomizedRoPE

SCHEMES = (
    *("sinusoidal", "rope", "randomized-rope", "transformer-xl", "alibi", "kerple", "fire"),
    *("dape-alibi", "dape-kerple", "dape-fire", "dape3-kerple"),
)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A table of tasks by schemes, each cell the models of some seeds."""

    out: str = "runs/chomsky"
    """folder of the cells, the table and the figures"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """names of tasks; `dape chomsky tasks` lists them"""
    schemes: tuple[str, ...] = SCHEMES
    """schemes to train, as `dape info schemes` names them"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of parameters, examples and dropout; the models of a cell train together"""
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained or scored, before anything is."""
        for name in ("tasks", "schemes", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name}={','.join(map(str, values))}: name each once, and some")
        for seed in self.seeds:
            check_whole(0, seeds=seed)
        _check(self)
        for scheme in self.schemes:
            _check_reach(self, scheme)
            for task in self.tasks:
                configure(self.model, scheme, resolve(task), self.training.length)

    @property
    def folder(self) -> Path:
        """Return the path of the folder."""
        return Path(self.out)

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers of a cell, besides its task, scheme and seed."""
        return {name: asdict(getattr(self, name)) for name in ("model", "training", "evaluation")}


def _check_reach(benchmark: Benchmark, scheme: str) -> None:
    """Raise a `UserError` for a scheme that has no positions for the longest input."""
    parts, pool = schemes.resolve(scheme), benchmark.model.pool
    if parts.embedding is not None and parts.embedding.module is Learned:
        raise UserError(
            f"schemes={scheme}: a learned embedding ends at the training length, so there is "
            "nothing to score beyond"
        )
    longest = benchmark.evaluation.longest
    most = max(longest + resolve(task).output_length(longest) for task in benchmark.tasks)
    if parts.rotation is not None and parts.rotation.module is RandomizedRoPE and pool < most:
        raise UserError(
            f"model.pool={pool} is less than the {most} tokens of the longest input and output; "
            "raise it, or lower evaluation.longest"
        )


def _check(benchmark: Benchmark) -> None:
    training, evaluation = benchmark.training, benchmark.evaluation
    for section, names in (
        ("model", ("hidden_size", "num_hidden_layers", "num_attention_heads", "adapter_hidden")),
        ("training", ("steps", "batch_size", "length")),
        ("evaluation", ("samples", "batch_tokens")),
    ):
        for name in names:
            check_whole(**{f"{section}.{name}": getattr(getattr(benchmark, section), name)})
    for name in ("learning_rate", "clip"):
        value = getattr(training, name)
        check_finite(**{f"training.{name}": value})
        if not value > 0:
            raise UserError(f"training.{name}={value} must be above 0")
    if not 0 <= training.dropout < 1:
        raise UserError(f"training.dropout={training.dropout} must be from 0 to below 1")
    if evaluation.longest <= training.length:
        raise UserError(
            f"evaluation.longest={evaluation.longest} must be above training.length="
            f"{training.length}: the score is over the lengths between"
        )


def read(path: Path) -> Benchmark:
    """Return the benchmark in a YAML file; what is not given has its default.

    Raises:
        UserError: for a file that cannot be read, an unknown key, or an impossible value.
    """
    data = read_yaml(shipped(path))
    try:
        found: Benchmark = strict.build(Benchmark, data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return found


def write(benchmark: Benchmark) -> str:
    """Return the YAML that `read` turns into this benchmark again."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(benchmark).items()
    }
    return yaml.safe_dump(plain, sort_keys=False)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return `section.key=new (was old)` of each setting that is not the same."""
    return [
        f"{section}.{key}={value} (was {before.get(section, {}).get(key)})"
        for section, values in after.items()
        for key, value in values.items()
        if before.get(section, {}).get(key) != value
    ]
