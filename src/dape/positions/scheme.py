"""Schemes: named choices for the four places, such as `dape-kerple`.

A name is a base, or an adapter and a base: `kerple`, `dape-kerple`, `dape3-nope`.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from dape.errors import UserError, unknown
from dape.positions.absolute import Learned, Sinusoidal
from dape.positions.adapter import DAPE, CoPE, TalkingHeads, TransformerXL
from dape.positions.bias import FIRE, T5, ALiBi, Kerple, KerplePower, Sandwich
from dape.positions.rotary import (
    NTK,
    DynamicNTK,
    Llama3,
    PositionInterpolation,
    RandomizedRoPE,
    RoPE,
    XPos,
    YaRN,
)

PLACES = ("embedding", "rotation", "bias", "adapter")
# Dimensions of the model: arguments of constructors by name, never options.
DIMENSIONS = frozenset({"num_heads", "head_dim", "hidden_size", "train_length"})


@dataclass(frozen=True, slots=True)
class Part:
    """A choice for a place: a module class and options of the constructor."""

    module: type[nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)

    def accepts(self) -> frozenset[str]:
        """Return the names of the constructor's options."""
        return frozenset(inspect.signature(self.module).parameters) - DIMENSIONS

    def check(self, options: Mapping[str, Any]) -> None:
        """Check the names of options.

        Raises:
            UserError: for an option unknown to the constructor, or set by the model.
        """
        for name in options:
            if name not in self.accepts():
                raise unknown(f"option of {self.module.__name__}", name, self.accepts())

    def build(self, dimensions: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
        """Return the module, built from options and from the `dimensions` of the model."""
        accepted = inspect.signature(self.module).parameters
        given = {name: value for name, value in dimensions.items() if name in accepted}
        return self.module(**given, **{**self.options, **options})


@dataclass(frozen=True, slots=True)
class Scheme:
    """A choice for each of the four places, `None` where position does not enter.

    An adapter before a base gives the scheme `paper`, `year` and `extrapolates`.

    Args:
        name: name of the scheme.
        paper: authors of the paper.
        year: year of the paper.
        extrapolates: in a few words, whether a model reads beyond the training length.
        embedding: module added to the token vectors.
        rotation: module that turns queries and keys.
        bias: module that adds B to the scores.
        adapter: module that maps scores and bias to logits.
    """

    name: str
    paper: str
    year: int
    extrapolates: str
    embedding: Part | None = None
    rotation: Part | None = None
    bias: Part | None = None
    adapter: Part | None = None

    def build(
        self, place: str, dimensions: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]
    ) -> nn.Module | None:
        """Return the module at a place, or None; `options` maps places to options."""
        part: Part | None = getattr(self, place)
        return None if part is None else part.build(dimensions, options.get(place, {}))


BASES = {
    base.name: base
    for base in (
        Scheme("nope", "Kazemnejad et al.", 2023, "no"),
        Scheme("sinusoidal", "Vaswani et al.", 2017, "no", embedding=Part(Sinusoidal)),
        Scheme("learned", "Gehring et al.", 2017, "no", embedding=Part(Learned)),
        Scheme("rope", "Su et al.", 2021, "no", rotation=Part(RoPE)),
        Scheme("partial-rope", "Black et al.", 2022, "no", rotation=Part(RoPE, {"fraction": 0.25})),
        Scheme("pi", "Chen et al.", 2023, "with fine-tuning", rotation=Part(PositionInterpolation)),
        Scheme("ntk", "bloc97", 2023, "in part", rotation=Part(NTK)),
        Scheme("dynamic-ntk", "emozilla", 2023, "in part", rotation=Part(DynamicNTK)),
        Scheme("yarn", "Peng et al.", 2024, "with fine-tuning", rotation=Part(YaRN)),
        Scheme("llama3", "Llama Team", 2024, "with fine-tuning", rotation=Part(Llama3)),
        Scheme("xpos", "Sun et al.", 2022, "in part", rotation=Part(XPos)),
        Scheme(
            "randomized-rope", "Ruoss et al.", 2023, "up to its pool", rotation=Part(RandomizedRoPE)
        ),
        Scheme("alibi", "Press et al.", 2022, "yes", bias=Part(ALiBi)),
        Scheme("kerple", "Chi et al.", 2022, "yes", bias=Part(Kerple)),
        Scheme("kerple-power", "Chi et al.", 2022, "yes", bias=Part(KerplePower)),
        Scheme("t5", "Raffel et al.", 2020, "in part", bias=Part(T5)),
        Scheme("sandwich", "Chi et al.", 2023, "yes", bias=Part(Sandwich)),
        Scheme("fire", "Li et al.", 2024, "in part", bias=Part(FIRE)),
        Scheme("cope", "Golovneva et al.", 2024, "in part", adapter=Part(CoPE)),
        Scheme("transformer-xl", "Dai et al.", 2019, "in part", adapter=Part(TransformerXL)),
    )
}
# Further variants in the DAPE paper (section 4.3 and Table 7): A + B + f(A + B), A + f([A; B]) and
# A + B + f(B).
DAPE_VARIANTS: dict[str, dict[str, Any]] = {
    "add": {"inputs": "sum"},
    "concat": {"residual": False},
    "bias": {"inputs": "bias"},
}
# Adapters that may precede a base, as schemes of the adapter alone.
ADAPTERS = {
    adapter.name: adapter
    for adapter in (
        Scheme("dape", "Zheng et al.", 2024, "further than its base", adapter=Part(DAPE)),
        *(
            Scheme(
                f"dape{size}",
                "Zheng et al. (V2)",
                2025,
                "further than its base",
                adapter=Part(DAPE, {"kernel_size": size}),
            )
            for size in (3, 5, 7)
        ),
        *(
            Scheme(
                f"dape-{variant}",
                "Zheng et al.",
                2024,
                "further than its base",
                adapter=Part(DAPE, options),
            )
            for variant, options in DAPE_VARIANTS.items()
        ),
        Scheme("talking-heads", "Shazeer et al.", 2020, "as its base", adapter=Part(TalkingHeads)),
    )
}


def fits(adapter: Scheme, base: Scheme) -> bool:
    """Return whether an adapter may precede a base.

    A base with an adapter takes no second adapter. Without a bias the variants of DAPE are equal,
    and only `dape` precedes the base.
    """
    is_variant = adapter.adapter is not None and bool(
        adapter.adapter.options.keys() & {"inputs", "residual"}
    )
    return base.adapter is None and not (is_variant and base.bias is None)


def compose(adapter: Scheme, base: Scheme) -> Scheme:
    """Return an adapter before a base; without a bias DAPE sees the scores alone."""
    part = adapter.adapter
    if part is not None and base.bias is None and "inputs" in part.accepts():
        part = replace(part, options={**part.options, "inputs": "scores"})
    return replace(
        adapter,
        name=f"{adapter.name}-{base.name}",
        embedding=base.embedding,
        rotation=base.rotation,
        bias=base.bias,
        adapter=part,
    )


SCHEMES = {
    scheme.name: scheme
    for base in BASES.values()
    for scheme in (base, *(compose(a, base) for a in ADAPTERS.values() if fits(a, base)))
}


def names() -> list[str]:
    """Return every scheme name."""
    return list(SCHEMES)


def check(name: str, options: Mapping[str, Any]) -> None:
    """Check the name of a scheme and the options of its modules.

    Raises:
        UserError: for an unknown name, place or option.
    """
    found = resolve(name)
    for place, chosen in options.items():
        if place not in PLACES:
            raise unknown("place in scheme_options", place, PLACES)
        part: Part | None = getattr(found, place)
        if part is None:
            raise UserError(
                f"scheme_options.{place} is set, but scheme {name!r} has no {place}; leave it out"
            )
        if not isinstance(chosen, Mapping):
            raise UserError(f"scheme_options.{place}={chosen!r} must map option names to values")
        part.check(chosen)


def resolve(name: str) -> Scheme:
    """Return the scheme of a name.

    Raises:
        UserError: for an unknown name, with the nearest known ones.
    """
    if name in ADAPTERS:
        raise UserError(f"scheme {name!r} is an adapter alone; add a base, as {name}-kerple")
    if name not in SCHEMES:
        raise unknown("scheme", name, {*BASES, *get_close_matches(name, SCHEMES)})
    return SCHEMES[name]
