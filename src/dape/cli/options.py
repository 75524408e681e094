"""Options shared by several commands, and options with several values in a word."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from dape.errors import UserError
from dape.evaluate.lengths import doubled
from dape.files import check_writable
from dape.strict import default


def lengths(text: str) -> tuple[int, ...]:
    """Return the ascending lengths in `128,256,1024` or `128,...,1024`, where `...` doubles.

    Raises:
        ValueError: for anything else.
    """
    if not re.fullmatch(r"[1-9]\d*(,(\.\.\.,)?[1-9]\d*)*", text):
        raise ValueError(f"{text!r} is not a list of lengths")
    found: list[int] = []
    for dots, digits in re.findall(r"(\.\.\.,)?(\d+)", text):
        found += [*(doubled(found[-1], int(digits)) if dots else ()), int(digits)]
    return tuple(sorted(set(found)))


def commas(metavar: str, read: Callable[[str], tuple[Any, ...]]) -> PrimitiveConstructorSpec[Any]:
    """Return the reader of an option with several values in a word."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


def _names(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(filter(None, text.split(","))))
    if not found:
        raise ValueError(f"{text!r} names nothing")
    return found


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return the reader of a list of numbers, each once."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(dict.fromkeys(map(kind, text.split(","))))
        except ValueError:
            raise ValueError(f"{text!r} is not a list of numbers") from None

    return read


Lengths = Annotated[tuple[int, ...], commas("INT,INT,...", lengths)]
Fractions = Annotated[tuple[float, ...], commas("FLOAT,...", _numbers(float))]
Seeds = Annotated[tuple[int, ...], commas("INT,...", _numbers(int))]
Layers = Annotated[tuple[int, ...], commas("INT,...", _numbers(int))]
Names = Annotated[tuple[str, ...], commas("NAME,...", _names)]
Runs = Annotated[
    tyro.conf.Positional[tuple[Path, ...]],
    tyro.conf.arg(metavar="RUN...", help_behavior_hint="(required)"),
]


@dataclass(frozen=True)
class Measuring:
    """Options of every command with measurements of models."""

    runs: Runs
    """run folders, model folders, or names on the hub (results then go to runs/NAME)"""
    lengths: Annotated[Lengths, default("the training length, doubled up to 16 times")] = ()
    """tokens in a window, as 128,...,16384"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto prefers a GPU"""
    batch_tokens: int = 16384
    """most tokens in a forward pass; a longer window goes alone"""
    out: Annotated[Path | None, default("the folder of each model", "PATH")] = None
    """folder for the results of all models"""
    partial_weights: bool = False
    """accept model files with missing weights, drawn at random, or with unused weights"""

    def __post_init__(self) -> None:
        """Refuse an empty list of runs, and batches without tokens."""
        if not self.runs:
            raise UserError("no model given: name a run or a model, RUN...")
        at_least_one(self, "batch_tokens")


def at_least_one(arguments: Any, *names: str) -> None:
    """Raise a `UserError` for an option below 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def check_out(*files: Path, formats: tuple[str, ...]) -> None:
    """Raise a `UserError` for a file with an unknown suffix, or that cannot be written."""
    for file in files:
        if file.suffix not in formats:
            raise UserError(f"--out {file}: the name must end in {', '.join(formats)}")
    check_writable(*files)
