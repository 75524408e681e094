"""Schemes: the names of what is chosen for the four places, such as `dape-kerple`.

A name is that of a base, with an adapter before it if any: `kerple`, `dape-kerple`, `dape3-nope`.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from dape.errors import UserError, unknown
from dape.positions.adapter import DAPE
from dape.positions.bias import ALiBi, Kerple, NoBias

PLACES = ("embedding", "rotation", "bias", "adapter")
# What a model tells the module of a place, if its constructor asks: no option may set these.
DIMENSIONS = frozenset({"num_heads", "head_dim", "hidden_size", "train_length"})


@dataclass(frozen=True, slots=True)
class Part:
    """What stands at one place: a module class and the options it is built with."""

    module: type[nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise a `UserError` for an option the constructor does not take, or the model decides."""
        accepted = inspect.signature(self.module).parameters.keys() - DIMENSIONS
        for name in options:
            if name not in accepted:
                raise unknown(f"option of {self.module.__name__}", name, accepted)

    def build(self, dimensions: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
        """Return the module; it takes of the model's `dimensions` those its constructor names."""
        accepted = inspect.signature(self.module).parameters
        given = {name: value for name, value in dimensions.items() if name in accepted}
        return self.module(**given, **{**self.options, **options})


@dataclass(frozen=True, slots=True)
class Scheme:
    """A choice for each of the four places; `None` where position does not enter."""

    name: str
    embedding: Part | None = None
    rotation: Part | None = None
    bias: Part | None = None
    adapter: Part | None = None

    def build(
        self, place: str, dimensions: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]
    ) -> nn.Module | None:
        """Return the module of one place, or None; `options` holds those of every place."""
        part: Part | None = getattr(self, place)
        return None if part is None else part.build(dimensions, options.get(place, {}))


BASES = {
    "nope": Scheme("nope"),
    "alibi": Scheme("alibi", bias=Part(ALiBi)),
    "kerple": Scheme("kerple", bias=Part(Kerple)),
}
ADAPTERS = {
    "dape": Part(DAPE),
    "dape3": Part(DAPE, {"kernel_size": 3}),
    "dape5": Part(DAPE, {"kernel_size": 5}),
    "dape7": Part(DAPE, {"kernel_size": 7}),
}
BIASES = {"none": NoBias, "alibi": ALiBi, "kerple": Kerple}


def names() -> list[str]:
    """Return every scheme name."""
    return [*BASES, *(f"{adapter}-{base}" for base in BASES for adapter in ADAPTERS)]


def check(name: str, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise a `UserError` unless the name is known and each option is one its module takes."""
    found = resolve(name)
    for place, chosen in options.items():
        if place not in PLACES:
            raise unknown("place in scheme_options", place, PLACES)
        part: Part | None = getattr(found, place)
        if part is None:
            raise UserError(f"scheme_options.{place} is set, but scheme {name!r} has no {place}")
        if not isinstance(chosen, Mapping):
            raise UserError(f"scheme_options.{place}={chosen!r} must map option names to values")
        part.check(chosen)


def resolve(name: str) -> Scheme:
    """Return the scheme of a name; DAPE sees the scores alone where the base has no bias.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    if name in BASES:
        return BASES[name]
    prefix, _, base = name.partition("-")
    if prefix not in ADAPTERS or base not in BASES:
        raise unknown("scheme", name, names())
    adapter = ADAPTERS[prefix]
    if BASES[base].bias is None:
        adapter = replace(adapter, options={**adapter.options, "inputs": "scores"})
    return replace(BASES[base], name=name, adapter=adapter)
