"""Mappings into dataclasses, without unknown keys and without values of a wrong type."""

import types
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from reprlib import Repr
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import arg

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
_short = Repr()
_short.maxstring = _short.maxother = 200


@dataclass(frozen=True, slots=True)
class Switch:
    """Marker of a choice with the further values `true` and `false`."""

    on: str
    off: str


def default(meaning: str, metavar: str | None = None) -> Any:
    """Return the annotation of an option whose empty default stands for `meaning`."""
    empty = ("None", "", "''")
    return arg(
        metavar=metavar,
        help_behavior_hint=lambda shown: f"(default: {meaning if shown in empty else shown})",
    )


def build(cls: type, data: Any, where: str = "") -> Any:
    """Return the dataclass `cls` from a mapping; nested dataclasses are sections.

    Raises:
        UserError: for an unknown key, with the nearest known key, or a value of a wrong type; the
            message begins with `where`.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where.rstrip('.')}={_short.repr(data)} must be a section of keys")
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in data.items():
        name = f"{where}{key}"
        if key not in hints:
            raise unknown("key", name, [where + field for field in hints])
        section = is_dataclass(hints[key])
        values[key] = (
            build(hints[key], value, name + ".") if section else _convert(value, hints[key], name)
        )
    return cls(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as a `hint`, an int as a float and a list as a tuple."""
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        for note in notes:
            if isinstance(note, Switch) and type(value) is bool:
                return note.on if value else note.off
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is float and type(value) is int:
            return float(value)
        if get_origin(option) is tuple and type(value) in (list, tuple):
            parts = get_args(option)
            if parts[-1] is Ellipsis:
                parts = parts[:1] * len(value)
            if len(parts) == len(value):
                return tuple(map(_convert, value, parts, [where] * len(parts)))
        if type(value) is (get_origin(option) or option):
            return value
    raise UserError(_mismatch(value, options, where))


def _mismatch(value: Any, options: tuple[Any, ...], where: str) -> str:
    """Return the error text for a value of none of the types."""
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
    return NAMES[get_origin(option) or option]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
