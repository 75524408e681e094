"""A frozen dataclass as a command line, with attribute docstrings as help and one-line errors."""

import inspect
import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

# tyro's only description of a mistake as data. The name is not public, and pyproject.toml restricts
# the version of tyro.
from tyro import _errors as mistakes

from dape.errors import UserError, unknown

Arguments = TypeVar("Arguments")
NARROWEST = 20  # columns of a terminal, for a page of help
_TIE = "\x1f"  # a space at which no line is broken


def parse(
    cls: type[Arguments], argv: Sequence[str], prog: str, default: Arguments | None = None
) -> Arguments:
    """Return a `cls` from `argv`; `--help` prints the page of `prog` and exits.

    Options are `--field value` and, in a nested dataclass, `--section.field value`; a field marked
    `tyro.conf.Positional` is given without a name. `default` replaces the default values of the
    class.

    Raises:
        UserError: for an unknown option (with the near names), a value of the wrong type or outside
            the choices, a missing value, and for the `ValueError` of a `__post_init__`.
    """
    defaults = {} if default is None else {"default": default}
    if shutil.get_terminal_size().columns < NARROWEST:  # tyro would break lines for ever
        os.environ["COLUMNS"] = str(NARROWEST)

    def refuse(mistake: mistakes.ParseErrorEvent) -> None:
        raise _error(mistake, cls, prog)

    with mistakes.on_parse_error(refuse):
        arguments = tyro.cli(cls, prog=prog, args=argv, description=_description(cls), **defaults)
    _check_numbers(arguments)
    return arguments


def _check_numbers(arguments: Any) -> None:
    """Raise a `UserError` for a whole number beyond 64 bits, and for a seed below 0."""
    for field in fields(arguments):
        value, option = getattr(arguments, field.name), f"--{field.name.replace('_', '-')}"
        if is_dataclass(value):
            _check_numbers(value)
        for each in value if isinstance(value, tuple) else (value,):
            least = 0 if field.name in ("seed", "seeds") else -(2**63)
            if type(each) is int and not least <= each < 2**63:
                bound = f"at least {least}" if each < least else "less than 2**63"
                raise UserError(f"{option} {each}: must be {bound}")


def _description(cls: type) -> str:
    """Return the docstring, wrapped at the width of the terminal.

    Lines are indented, because tyro joins lines that begin with a letter. Code is not broken.
    """
    width = shutil.get_terminal_size().columns
    wrapper = textwrap.TextWrapper(width, "  ", "  ", break_on_hyphens=False)
    text = inspect.cleandoc(cls.__doc__ or "")
    text = re.sub("`[^`]*`", lambda code: re.sub(r"\s+", _TIE, code.group()), text)
    return "\n".join(map(wrapper.fill, text.split("\n\n"))).replace(_TIE, " ")


def _error(mistake: mistakes.ParseErrorEvent, cls: type, prog: str) -> UserError:
    """Return the message of a mistake."""
    tokens = getattr(mistake, "tokens", None) or getattr(mistake, "unrecognized_tokens", None)
    if tokens:
        return _unexpected(tokens[0], set(options_of(cls)))
    if isinstance(mistake, mistakes.InstantiationFailure) and mistake.argument is None:
        return UserError(mistake.message)
    return UserError(f"{_summary(mistake)} (see `{prog} --help`)")


def _summary(mistake: mistakes.ParseErrorEvent) -> str:
    if isinstance(mistake, mistakes.MissingArgs):
        absent = [each.arg for each in mistake.missing_arguments]
        return f"missing: {', '.join(_form(each) for each in absent)}"
    argument = getattr(mistake, "argument", None)
    if argument is None:
        return "the words do not form a valid command"
    if isinstance(mistake, mistakes.InvalidChoice):
        allowed = ", ".join(map(repr, mistake.choices))
        return f"{argument.display_name()}: invalid choice {mistake.value!r}, not one of {allowed}"
    if isinstance(mistake, mistakes.InstantiationFailure):
        # For a union of types, the last line explains the mismatch with the last type.
        reason = re.sub(r"^- <class '\w+'>: ", "", mistake.message.splitlines()[-1])
        return f"{argument.display_name()}: {reason}; expected {_form(argument)}"
    return f"Missing value: expected {_form(argument)}"


def _form(argument: Any) -> str:
    """Return the form of an argument, such as `--steps INT (default: 3)`."""
    shown = argument.field.default
    default = f" (default: {shown})" if isinstance(shown, str | int | float) else ""
    if argument.is_positional():
        return f"{argument.lowered.metavar}{default}"
    return f"{argument.display_name()} {argument.lowered.metavar}{default}"


def options_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the names of the options for the fields of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        hint = hints[field.name]
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if tyro.conf.Positional in marks:
            continue
        given = [mark.name for mark in marks if getattr(mark, "name", None) is not None]
        name = given[0] if given else field.name
        path = ".".join(filter(None, (prefix, name.replace("_", "-"))))
        if is_dataclass(kind) and isinstance(kind, type):
            yield from options_of(kind, path)
        else:
            yield f"--{path}"


def _unexpected(argument: str, known: set[str]) -> UserError:
    if not argument.startswith("-"):
        return UserError(
            f"unexpected argument {argument!r}; options are `--name value`, switches `--name`"
        )
    name = argument.partition("=")[0].replace("_", "-")
    nested = sorted(option for option in known if option.endswith("." + name.lstrip("-")))
    if nested:
        return UserError(f"unknown option {name!r}; did you mean {' or '.join(nested)}?")
    return unknown("option", name, known)
