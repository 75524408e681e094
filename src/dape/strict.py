"""Mappings into dataclasses, without unknown keys and without values of a wrong type.

A recipe is such a mapping in YAML, a record of a measurement one in JSON.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from reprlib import Repr
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dape.errors import UserError, unknown

NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    types.NoneType: "nothing",
}
_TAKEN = {float: (float, int), list: (list, tuple), tuple: (list, tuple)}
_short = Repr()
_short.maxstring = _short.maxother = 200


@dataclass(frozen=True, slots=True)
class Switch:
    """Marker of a choice with the further values `true` and `false`."""

    on: str
    off: str


@dataclass(frozen=True, slots=True)
class _NullIsNaN:
    """Marker of a number that is NaN for null in a file, where no number exists."""


Number = Annotated[float, _NullIsNaN()]


def default(meaning: str, metavar: str | None = None) -> Any:
    """Return the annotation of an option whose empty default stands for `meaning`."""
    from tyro.conf import arg

    empty = ("None", "", "''")
    return arg(
        metavar=metavar,
        help_behavior_hint=lambda shown: f"(default: {meaning if shown in empty else shown})",
    )


@dataclass(frozen=True, slots=True)
class Holds:
    """Marker of a mapping with certain keys, whose values have certain types."""

    types: Mapping[str, Any]


def build(cls: type, data: Any, where: str = "") -> Any:
    """Return the dataclass `cls` from a mapping; nested dataclasses are sections of it.

    Raises:
        UserError: for an unknown or missing key, with the nearest known key, or a value of a wrong
            type; the message begins with `where`.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where.rstrip('.')}={_short.repr(data)} must be a section of keys")
    hints = _hints(cls)
    for key in data:
        if key not in hints:
            raise unknown("key", f"{where}{key}", [where + field for field in hints])
    for name in _required(cls):
        if name not in data:
            raise UserError(f"{where}{name} is missing")
    return cls(**{key: _convert(value, hints[key], where + key) for key, value in data.items()})


def check_keys(data: Mapping[str, Any], types: Mapping[str, Any], where: str = "") -> None:
    """Raise a `UserError` for a mapping without some keys, or with values of other types."""
    for key, hint in types.items():
        if key not in data:
            raise UserError(f"{where}{key} is missing")
        _convert(data[key], hint, where + key)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


@cache
def _required(cls: type) -> tuple[str, ...]:
    """Return the names of the fields without a default."""
    return tuple(
        field.name
        for field in fields(cls)
        if field.default is MISSING and field.default_factory is MISSING
    )


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as a `hint`: an int as a float, a list as a tuple, all else as it is."""
    if is_dataclass(hint):
        built = isinstance(value, hint)  # type: ignore[arg-type]
        return value if built else build(hint, value, f"{where}.")  # type: ignore[arg-type]
    hint, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    for note in notes:
        if isinstance(note, Switch) and type(value) is bool:
            return note.on if value else note.off
        if isinstance(note, _NullIsNaN) and value is None:
            return math.nan
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if _fits(value, option):
            converted = _cast(value, option, where)
            for note in notes:
                if isinstance(note, Holds):
                    check_keys(converted, note.types, f"{where}.")
            return converted
    raise UserError(_mismatch(value, options, where))


def _fits(value: Any, option: Any) -> bool:
    """Return whether a value has the form of a type, whatever is in a list or a mapping."""
    kind, parts = get_origin(option) or option, get_args(option)
    if kind is Literal:
        return value in parts
    if kind is tuple and Ellipsis not in parts:
        return type(value) in (list, tuple) and len(value) == len(parts)
    if is_dataclass(kind):
        return isinstance(value, Mapping)
    return kind is Any or type(value) in _TAKEN.get(kind, (kind,))


def _cast(value: Any, option: Any, where: str) -> Any:
    """Return a value that fits a type as that type, with all that is in it."""
    kind, parts = get_origin(option) or option, get_args(option)
    if is_dataclass(kind):
        return build(option, value, f"{where}.")
    if kind is float:
        return _float(value)
    if kind in (list, tuple) and parts:
        each = (parts[0],) * len(value) if kind is list or Ellipsis in parts else parts
        return kind(map(_convert, value, each, [where] * len(each)))
    if kind is dict and parts:
        return {
            _key(name, parts[0], where): _convert(one, parts[1], f"{where}.{name}")
            for name, one in value.items()
        }
    return value


def _key(name: Any, kind: Any, where: str) -> Any:
    """Return the key of a mapping as its type; in JSON every key is text."""
    if kind is not int:
        return name
    if not str(name).isdecimal():
        raise UserError(f"{where}.{name}: expected {NAMES[int]} as key")
    return int(name)


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond all floats
        return math.inf if value > 0 else -math.inf


def _mismatch(value: Any, options: tuple[Any, ...], where: str) -> str:
    """Return what is wrong with a value that is of none of the types."""
    remedy = ""
    if isinstance(value, str) and not {int, float}.isdisjoint(options) and _is_number(value):
        number = f"{float(value):.1e}" if float in options else f"{float(value):.0f}"
        remedy = f"; YAML reads text, write {number}"
    expected = " or ".join(map(_describe, options))
    return f"{where}={_short.repr(value)}: expected {expected}{remedy}"


def _describe(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(map(repr, get_args(option)))
    if get_origin(option) is tuple and Ellipsis in get_args(option):
        return "a list"
    if get_origin(option) is tuple:
        return f"a list of {len(get_args(option))} numbers"
    if is_dataclass(option):
        return "a section of keys"
    return NAMES[get_origin(option) or option]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
