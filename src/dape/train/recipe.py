"""Recipes: a YAML file as frozen dataclasses, checked before anything heavy is loaded."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

import yaml

from dape import strict
from dape.errors import UserError, check_whole
from dape.files import read_recipe
from dape.runs import RunFolder
from dape.strict import default
from dape.train.sections import Base, Hardware, Model, Optimizer, Tracking, Training

_WITHOUT_EFFECT = ("name", "out", "data", "hardware", "tracking")  # on the trained weights
SEEDS = 2**32  # PyTorch on a CPU draws alike for seeds with equal remainders
_Settings = TypeVar("_Settings", bound="Settings")


@dataclass(frozen=True, slots=True)
class Settings(ABC):
    """Everything that a run depends on, apart from the model, which subclasses add."""

    name: str = "{scheme}"
    """name of the run; {scheme}, {seed} and keys such as {training.length} are filled in"""
    out: Annotated[str | None, default("runs/NAME", "STR")] = None
    """folder of the run"""
    seed: int = 0
    """seed of the weights and of the order of the data"""
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    hardware: Hardware = field(default_factory=Hardware)
    tracking: Tracking = field(default_factory=Tracking)

    @property
    @abstractmethod
    def scheme(self) -> str:
        """The scheme, for {scheme} in the name."""

    def __post_init__(self) -> None:
        """Refuse an unfit name or seed, and a batch not divisible by the micro-batch."""
        _check_name(self.name, self._filled())
        check_whole(0, seed=self.seed)
        if self.seed >= SEEDS:
            raise UserError(
                f"seed={self.seed} must be below {SEEDS:,}; PyTorch takes the remainder"
            )
        self.micro_batches(groups=1)

    @property
    def folder(self) -> Path:
        """Return the path of the run folder."""
        return Path(self.out) if self.out else Path("runs") / self._filled()

    @property
    def run(self) -> RunFolder:
        """Return the run folder."""
        return RunFolder(self.folder)

    def groups(self, ranks: int) -> int:
        """Return the number of groups of devices that share a batch, for `ranks` devices.

        Raises:
            UserError: for a number of devices not divisible by the size of a group.
        """
        context = self.hardware.context_parallel
        if ranks % context:
            raise UserError(
                f"hardware.context_parallel={context} does not divide {ranks} devices; start"
                f" {context} or a multiple with `torchrun --nproc_per_node=...`"
            )
        return ranks // context

    def micro_batches(self, groups: int) -> int:
        """Return the number of micro-batches of a step on each of the `groups` of devices.

        Raises:
            UserError: for a batch not divisible into micro-batches.
        """
        batch, size = self.training.batch_size, self.hardware.micro_batch_size
        devices = "devices" if self.hardware.context_parallel == 1 else "groups of devices"
        if size and batch % (groups * size):
            raise UserError(
                f"training.batch_size={batch} is not a multiple of hardware.micro_batch_size={size}"
                f" x {groups} {devices}; change one of them"
            )
        if batch % groups:
            raise UserError(
                f"training.batch_size={batch} cannot be shared evenly by {groups} {devices}; take a"
                f" multiple of {groups}"
            )
        return batch // (groups * size) if size else 1

    def _filled(self) -> str:
        """Return the name with {keys} replaced by their values, except for unknown keys."""
        values = asdict(self) | {"scheme": self.scheme}
        return re.sub(r"{([^{}]*)}", lambda blank: _value(values, blank[1]) or blank[0], self.name)


@dataclass(frozen=True, slots=True)
class Recipe(Settings):
    """The recipe of a language model, with everything that the training depends on."""

    data: str = "data/python-stdlib"
    """folder written by `dape prepare`"""
    model: Model = field(default_factory=Model)

    @property
    def scheme(self) -> str:
        """The scheme."""
        return self.model.scheme


@dataclass(frozen=True, slots=True)
class Retrofit(Settings):
    """The recipe of a fine-tuning run; `training.length` is the length to learn to read."""

    name: str = "retrofit-{scheme}"
    """name of the run; {scheme}, {seed} and keys such as {training.length} are filled in"""
    training: Training = field(
        default_factory=lambda: Training(length=2048, batch_size=32, steps=1000)
    )
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(learning_rate=1e-2, warmup=0.05, weight_decay=0.0)
    )
    tracking: Tracking = field(
        default_factory=lambda: Tracking(validate_every=100, checkpoint_every=250)
    )
    data: str = "data/python-stdlib"
    """folder written by `dape prepare` with the model's tokenizer"""
    model: Base = field(default_factory=Base)

    @property
    def scheme(self) -> str:
        """The mounted adapter and bias, such as `dape-kerple`."""
        mounted = filter(None, (self.model.adapter, self.model.bias))
        return "-".join(mounted) if self.model.adapter else "plain"


def read(path: str | os.PathLike[str], kind: type[_Settings]) -> _Settings:
    """Return the recipe in a YAML file; the default name is the name of the file.

    Raises:
        UserError: for a file that cannot be read, an unknown or repeated key (with the near name),
            a value of the wrong type, or an impossible combination.
    """
    path = Path(path)
    data = read_recipe(path)
    try:
        recipe: _Settings = strict.build(kind, {"name": path.stem, **data})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return recipe


def write(recipe: Settings) -> str:
    """Return the recipe as YAML, the input of `read`."""
    return yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False)


def override(recipe: _Settings, changes: Mapping[str, Any]) -> _Settings:
    """Return the recipe with changed values, by key, dotted key or section.

    `{"seed": 1, "training.steps": 10}` and `{"seed": 1, "training": {"steps": 10}}` are the same.

    Raises:
        UserError: as `read`.
    """
    data = asdict(recipe)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        keys = {name: value} if name else value
        nested = isinstance(data.get(section), dict) and isinstance(keys, Mapping)
        data[section] = data[section] | dict(keys) if nested else keys
    changed: _Settings = strict.build(type(recipe), data)
    return changed


def differences(old: Settings, new: Settings) -> list[str]:
    """Return `section.key=new (was old)` for changed values that affect the weights."""
    before, after = (
        flat({k: v for k, v in asdict(recipe).items() if k not in _WITHOUT_EFFECT})
        for recipe in (old, new)
    )
    return [
        f"{key}={after[key]} (was {before.get(key)})"
        for key in after
        if after[key] != before.get(key)
    ]


def flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe's `asdict` by dotted keys, such as `training.length`."""
    values: dict[str, Any] = {}
    for name, value in sections.items():
        nested = isinstance(value, Mapping)
        values |= (
            {f"{name}.{key}": each for key, each in value.items()} if nested else {name: value}
        )
    return values


def _value(values: Any, key: str) -> str | None:
    """Return the value at a dotted key as text; None for a mapping or an absent key."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return None if values is None or isinstance(values, Mapping) else str(values)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _check_name(name: str, filled: str) -> None:
    if re.search(r"[{}]", filled):
        raise UserError(
            f"name={name!r}: beside keys such as {{training.length}} a name may hold {{scheme}} and"
            " {seed} only"
        )
    parts = PurePosixPath(filled).parts
    if not parts or "/" in parts or ".." in parts or not filled.isprintable():
        raise UserError(
            f"name={name!r} is not a valid name for a folder below runs; give one such as"
            " demo/kerple-0, or --out for another place"
        )
