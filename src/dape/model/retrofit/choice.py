"""The adapter and the bias of an attention, and a check for unchanged logits at the start."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dape.errors import UserError, unknown
from dape.positions.adapter import DAPE, Rows, TransformerXL, adapted
from dape.positions.scheme import ADAPTERS, BASES, DIMENSIONS, Part

Factory = str | Callable[..., nn.Module]

PARTS: dict[str, dict[str, Part]] = {
    "adapter": {
        name: scheme.adapter
        for name, scheme in (ADAPTERS | BASES).items()
        if scheme.adapter is not None
    },
    "bias": {name: scheme.bias for name, scheme in BASES.items() if scheme.bias is not None},
}
# The parameters of an adapter's last layer; further adapters start at zero by themselves.
LAST_LAYER = {DAPE: ("weight_out", "bias_out"), TransformerXL: ("weight", "u", "v")}


@dataclass(frozen=True, slots=True)
class Choice:
    """An adapter and a bias, by a name of `PARTS` or as a factory, with options.

    `options` maps `adapter` and `bias` to options of their constructors.
    """

    adapter: Factory
    bias: Factory | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def check(self) -> None:
        """Check names, factories and options.

        Raises:
            UserError: for an unknown name or option.
        """
        if not isinstance(self.options, Mapping):
            raise UserError(f"options={self.options!r} must map {' and '.join(PARTS)} to options")
        for place, chosen in self.options.items():
            if place not in PARTS:
                raise unknown("place in options", place, PARTS)
            if not isinstance(chosen, Mapping):
                raise UserError(f"options.{place}={chosen!r} must map option names to values")
        if self.bias is None and "bias" in self.options:
            raise UserError("options.bias is set without a bias; give bias=, such as 'kerple'")
        for place in PARTS:
            part = self.part(place)
            if part is not None:
                part.check(self.options.get(place, {}))

    def part(self, place: str) -> Part | None:
        """Return the part at a place."""
        given: Factory | None = getattr(self, place)
        return None if given is None else part_of(place, given)

    def names(self) -> dict[str, Any]:
        """Return the choice for a file, with the class name of a user's factory."""
        found: dict[str, Any] = {"adapter": None, "bias": None, "options": {}}
        for place in PARTS:
            part = self.part(place)
            if part is not None:
                found[place] = name_of(place, part)
                options = {**part.options, **self.options.get(place, {})}
                found["options"] |= {place: options} if options else {}
        return found

    def build(
        self, dimensions: Mapping[str, Any], own: nn.Module | None
    ) -> tuple[nn.Module, nn.Module | None]:
        """Return adapter and bias for an attention; `own` is the bias of the model.

        A new bias enters only f, as `A + f([A; B])`. A bias of the model stays with the scores, as
        `A + B + f([A; B])`. Without a bias the logits are `A + f(A)`.

        Raises:
            UserError: for two biases, a factory without a module, or a new adapter that changes
                the logits.
        """
        new = self.part("bias")
        if own is not None and new is not None:
            raise UserError(
                f"bias={self.names()['bias']!r}: the model has {type(own).__name__} "
                "already, visible to the adapter; let bias be None"
            )
        options = self.options.get("adapter", {})
        bias = own
        if new is not None:
            bias = built("bias", new, dimensions, self.options.get("bias", {}))
        part = part_of("adapter", self.adapter)
        form: dict[str, Any] = {"inputs": "scores"} if bias is None else {}
        form |= {"residual": False} if new else {}
        form = {name: value for name, value in form.items() if name in part.accepts()}
        adapter = built("adapter", part, dimensions, {**form, **part.options, **options})
        silence(adapter)
        check_silent(adapter, bias is not None, own is not None, dimensions)
        return adapter, bias


def part_of(place: str, given: Factory) -> Part:
    """Return the part of a name, or of a factory with the options of a `functools.partial`.

    Raises:
        UserError: for an unknown name, a module or another value in place of a factory, or a
            `partial` with values without names or with dimensions of the model.
    """
    if isinstance(given, nn.Module):
        raise UserError(
            f"{place}={type(given).__name__}(...) is a module, but layers need separate ones; give "
            f"the class, {place}={type(given).__name__}, or functools.partial of it with options"
        )
    if callable(given):
        if isinstance(given, functools.partial):
            check_partial(place, given)
            return Part(given.func, given.keywords)  # type: ignore[arg-type]
        return Part(given)  # type: ignore[arg-type]
    if not isinstance(given, str):
        raise UserError(
            f"{place}={given!r} is neither a name nor a class; known names: "
            f"{', '.join(PARTS[place])}"
        )
    if given in PARTS[place]:
        return PARTS[place][given]
    for name in ADAPTERS if place == "adapter" else ():
        base = given.removeprefix(f"{name}-")
        if base != given and base in BASES:
            bias = f", bias={base!r}" if base in PARTS["bias"] else ""
            raise UserError(f"adapter={given!r} is a whole scheme; give adapter={name!r}{bias}")
    raise unknown(place, given, PARTS[place])


def check_partial(place: str, given: functools.partial[Any]) -> None:
    """Check that the values of a `functools.partial` are options by name.

    Raises:
        UserError: for values without names, and for dimensions, which the model gives.
    """
    name = getattr(given.func, "__name__", repr(given.func))
    if given.args:
        values = ", ".join(map(repr, given.args))
        raise UserError(
            f"{place}=functools.partial({name}, {values}): values need names, such as "
            "functools.partial(dape.DAPE, hidden=64)"
        )
    taken = DIMENSIONS & inspect.signature(given.func).parameters.keys()
    if dimensions := sorted(taken & given.keywords.keys()):
        raise UserError(
            f"{place}=functools.partial({name}, {dimensions[0]}={given.keywords[dimensions[0]]!r}):"
            f" the model gives {dimensions[0]}; leave it out"
        )


def built(
    place: str, part: Part, dimensions: Mapping[str, Any], options: Mapping[str, Any]
) -> nn.Module:
    """Return the module of a part; raise a `UserError` if a factory returns something else."""
    found = part.build(dimensions, options)
    if not isinstance(found, nn.Module):
        raise UserError(
            f"{place}={part.module.__name__} returned a {type(found).__name__}; a factory returns "
            "a torch.nn.Module"
        )
    return found


def name_of(place: str, part: Part) -> str:
    """Return the shortest name of a part's module, or else the name of the class."""
    known = (name for name, other in PARTS[place].items() if other.module is part.module)
    return next(known, part.module.__name__)


def silence(adapter: nn.Module) -> None:
    """Set an adapter's last layer to zero."""
    with torch.no_grad():
        for name in LAST_LAYER.get(type(adapter), ()):
            adapter.get_parameter(name).zero_()


def check_silent(
    adapter: nn.Module, biased: bool, added: bool, dimensions: Mapping[str, Any]
) -> None:
    """Check the logits of a new adapter, A, or A + B for a model with a bias.

    Raises:
        UserError: for an adapter that changes the logits.
    """
    heads, width = dimensions["num_heads"], dimensions["head_dim"]

    def wave(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.arange(count, dtype=torch.float32).cos().view(shape)

    scores, bias = wave(1, heads, 2, 3), biased * (1 + wave(heads, 2, 3))
    places = torch.arange(1, 3), torch.arange(3)
    visible = (places[1] <= places[0][:, None])[None, None]
    rows = Rows(wave(1, heads, 2, width), wave(1, heads, 3, width), *places, visible, 1.0)
    with torch.no_grad():
        change = (adapted(adapter, scores, bias, rows) - scores - added * bias).abs().max().item()
    if not change < 1e-6:
        expected = "A + B, with the model's own bias B" if added else "A, whatever the bias"
        raise UserError(
            f"the adapter {type(adapter).__name__} changes the logits before "
            f"any training, by {change:.2g} on scores up to 1: it must start as {expected}; take "
            f"'dape'{', or let bias be None' if biased and not added else ''}"
        )
