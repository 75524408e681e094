"""A frozen dataclass as a command line: attribute docstrings are the help, errors are one line."""

import re
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from typing import TypeVar

import tyro

from dape.errors import UserError, unknown

Arguments = TypeVar("Arguments")


def parse(
    cls: type[Arguments], argv: Sequence[str], prog: str, default: Arguments | None = None
) -> Arguments:
    """Return the `cls` that `argv` describes; `--help` prints the page of `prog` and exits.

    Options are `--field value` and, in a nested dataclass, `--section.field value`; a field marked
    `tyro.conf.Positional` is given without a name. `default` holds the values of what is not given,
    instead of those that the class declares.

    Raises `UserError` for an unknown option (with the near names), a value of the wrong type or
    outside the choices, a missing value, and for the `ValueError` of a `__post_init__`.
    """
    defaults = {} if default is None else {"default": default}
    screen = StringIO()
    try:
        with redirect_stderr(screen):
            arguments, rest = tyro.cli(
                cls, prog=prog, args=argv, return_unknown_args=True, **defaults
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        if isinstance(stop.__context__, UserError):
            raise stop.__context__ from None
        raise UserError(f"{_summary(screen.getvalue())} (see `{prog} --help`)") from None
    if rest:
        raise _unexpected(rest[0], _help(cls, prog, defaults))
    return arguments


def _summary(box: str) -> str:
    """Return what tyro's error box says first, and the form of the argument if it shows that."""
    lines = (line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰")))
    first, *more = re.split(r" *─+ *", " ".join(" ".join(lines).split()))
    heading = "Argument helptext:"
    forms = [part.removeprefix(heading) for part in more if part.startswith(heading)]
    return "; expected".join([first.rstrip("."), *forms])


def _help(cls: type[Arguments], prog: str, defaults: dict[str, Arguments]) -> str:
    page = StringIO()
    with suppress(SystemExit), redirect_stdout(page):
        tyro.cli(cls, prog=prog, args=["--help"], **defaults)
    return page.getvalue()


def _unexpected(argument: str, page: str) -> UserError:
    if not argument.startswith("-"):
        return UserError(
            f"unexpected argument {argument!r}; options are `--name value`, switches `--name`"
        )
    name = argument.partition("=")[0].replace("_", "-")
    known = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", page)) - {"--help"}
    nested = sorted(option for option in known if option.endswith("." + name.lstrip("-")))
    if nested:
        return UserError(f"unknown option {name!r}; did you mean {' or '.join(nested)}?")
    return unknown("option", name, known)
