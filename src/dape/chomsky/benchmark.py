"""The benchmark as data: tasks, schemes and seeds, and settings of models, training and scores."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dape import strict
from dape.chomsky.encoder import Model, configure
from dape.chomsky.measure import Evaluation
from dape.chomsky.stack import Training
from dape.chomsky.task import SEEDS
from dape.chomsky.tasks import TASKS, resolve
from dape.errors import UserError, check_finite, check_whole
from dape.files import read_recipe
from dape.positions import scheme as schemes
from dape.positions.absolute import Learned
from dape.positions.rotary import RandomizedRoPE

DEEPEST = 1_000  # layers
LONGEST = 10_000  # symbols of an input; a model is tested at every length
SCHEMES = (
    *("sinusoidal", "rope", "randomized-rope", "transformer-xl", "alibi", "kerple", "fire"),
    *("dape-alibi", "dape-kerple", "dape-fire", "dape3-kerple"),
)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A table of tasks by schemes, with a cell per task, scheme and seed."""

    out: str = "runs/chomsky"
    """folder of the cells, the table and the figures"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """names of tasks (`dape chomsky tasks`)"""
    schemes: tuple[str, ...] = SCHEMES
    """schemes to train (`dape info schemes`)"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of parameters, examples and dropout; the models of all seeds train together"""
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        """Refuse impossible values before any training."""
        for name in ("tasks", "schemes", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name}={','.join(map(str, values))}: give a value, each once")
        for seed in self.seeds:
            check_whole(0, seeds=seed)
            if seed >= SEEDS:
                raise UserError(f"seeds={seed} must be below {SEEDS:,}")
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
        """Return the settings behind the numbers of a cell, besides task, scheme and seed."""
        return {name: asdict(getattr(self, name)) for name in ("model", "training", "evaluation")}


def _check_reach(benchmark: Benchmark, scheme: str) -> None:
    """Raise a `UserError` for a scheme without positions for the longest input."""
    parts, pool = schemes.resolve(scheme), benchmark.model.pool
    if parts.embedding is not None and parts.embedding.module is Learned:
        raise UserError(
            f"schemes={scheme}: a learned embedding ends at the training length, and longer "
            "inputs cannot be scored; leave the scheme out"
        )
    longest = benchmark.evaluation.longest
    most = max(longest + resolve(task).output_length(longest) for task in benchmark.tasks)
    if parts.rotation is not None and parts.rotation.module is RandomizedRoPE and pool < most:
        raise UserError(
            f"model.pool={pool} is less than the {most} tokens of the longest input and output; "
            "raise model.pool, or lower evaluation.longest"
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
    for name, value, most in (
        ("model.num_hidden_layers", benchmark.model.num_hidden_layers, DEEPEST),
        ("evaluation.longest", evaluation.longest, LONGEST),
    ):
        if value > most:
            raise UserError(f"{name}={value} must be at most {most}")
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
            f"{training.length}, because the score covers the lengths between"
        )


def read(path: Path) -> Benchmark:
    """Return the benchmark in a YAML file, with defaults for absent keys.

    Raises:
        UserError: for a file that cannot be read, an unknown key, or an impossible value.
    """
    data = read_recipe(path)
    try:
        found: Benchmark = strict.build(Benchmark, data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return found


def write(benchmark: Benchmark) -> str:
    """Return the benchmark as YAML, the input of `read`."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(benchmark).items()
    }
    return yaml.safe_dump(plain, sort_keys=False)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return `section.key=new (was old)` for changed settings."""
    return [
        f"{section}.{key}={value} (was {before.get(section, {}).get(key)})"
        for section, values in after.items()
        for key, value in values.items()
        if before.get(section, {}).get(key) != value
    ]
