"""YAML into dataclasses, strictly: no unknown or repeated key, no value of another type."""

import types
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

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


def load(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UserError: naming the file, and the line if it is known.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no `key: value` lines")
    return data


def build(cls: type, data: Any, where: str = "") -> Any:
    """Return the dataclass `cls` from a mapping; nested dataclasses are sections of it.

    Raises:
        UserError: for an unknown key, with the nearest known one, or a value that does not have its
            field's type; `where` is put before their names.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where.rstrip('.')}={data!r} must be a section of keys")
    hints = get_type_hints(cls)
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


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which the standard loader drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.MarkedYAMLError(
                problem=f"key {twice!r} is given twice", problem_mark=node.start_mark
            )
        return mapping


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as a `hint`: an int as a float, a list as a tuple, all else as it is."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is float and type(value) is int:
            return float(value)
        if get_origin(option) is tuple and type(value) is list:
            parts = get_args(option)
            if len(parts) == len(value):
                return tuple(map(_convert, value, parts, [where] * len(parts)))
        if type(value) is (get_origin(option) or option):
            return value
    remedy = ""
    if float in options and isinstance(value, str) and _is_number(value):
        remedy = f"; YAML takes it for text, write {float(value):.1e}"
    expected = " or ".join(map(_describe, options))
    raise UserError(f"{where}={value!r}: expected {expected}{remedy}")


def _describe(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(map(repr, get_args(option)))
    if get_origin(option) is tuple:
        return f"a list of {len(get_args(option))} numbers"
    return NAMES[get_origin(option) or option]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
