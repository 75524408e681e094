import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from tyro.conf import Positional, arg

from dape.cli.arguments import NARROWEST, options_of, parse
from dape.errors import UserError


@dataclass(frozen=True)
class Inner:
    """How to step."""

    learning_rate: float = 0.5
    """Size of a step."""
    steps: int = 3
    """How many."""


@dataclass(frozen=True)
class Outer:
    """Do a thing."""

    names: Positional[tuple[str, ...]] = ("first",)
    """What to do it to."""
    mode: Literal["stop", "skip"] = "stop"
    """What then."""
    fast: bool = False
    """Whether to hurry."""
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.inner.steps < 0:
            raise UserError(f"steps {self.inner.steps} must not be negative")


def error(*argv):
    with pytest.raises(UserError) as caught:
        parse(Outer, argv, "dape thing")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_reach_their_fields():
    argv = ["a", "b", "--mode", "skip", "--fast", "--inner.learning_rate", "-1", "--inner.steps=7"]
    assert parse(Outer, argv, "dape thing") == Outer(("a", "b"), "skip", True, Inner(-1.0, 7))


def test_what_is_not_given_comes_from_the_default():
    default = Outer(("x",), "skip", True, Inner(0.25, 9))
    parsed = parse(Outer, ["--inner.steps", "1"], "dape thing", default)
    assert parsed == Outer(("x",), "skip", True, Inner(0.25, 1))
    assert parse(Outer, [], "dape thing") == Outer()


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--mdoe", "skip"], ["unknown option '--mdoe'", "did you mean '--mode'?"]),
        (["--inner.learnin_rate", "1"], ["did you mean '--inner.learning-rate'?"]),
        (["--steps", "4"], ["unknown option '--steps'", "did you mean --inner.steps?"]),
        (["a", "--zzz=3"], ["unknown option '--zzz'", "--inner.steps", "--mode"]),
        (["--fast", "a", "--mode", "skip", "b"], ["unexpected argument 'b'"]),
        (["--mode", "jump"], ["--mode", "'jump'", "'stop', 'skip'"]),
        (["--inner.steps", "many"], ["--inner.steps", "'many'", "expected", "INT", "default: 3"]),
        (["--mode"], ["--mode", "Missing value", "dape thing --help"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv, parts):
    message = error(*argv)
    assert [part for part in parts if part not in message] == []


def test_a_check_of_the_class_speaks_for_itself():
    assert error("--inner.steps", "-2") == "steps -2 must not be negative"


def test_help_shows_text_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Outer, ["--help"], "dape thing")
    page = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "usage: dape thing" in page
    assert "Size of a step. (default: 0.5)" in page
    assert "What to do it to. (default: first)" in page


@dataclass(frozen=True)
class Numbers:
    """Count."""

    seed: int = 0
    """Seed."""
    counts: tuple[int, ...] = ()
    """Counts."""
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--seed", str(2**63)], f"--seed {2**63}: must be less than 2**63"),
        (["--counts", "1", str(10**20)], f"--counts {10**20}: must be less than 2**63"),
        (["--inner.steps", str(-(10**20))], f"--steps -{10**20}: must be at least -{2**63}"),
    ],
)
def test_a_number_beyond_64_bits_and_a_seed_below_0_are_refused(words, message):
    assert parse(Numbers, ["--seed", "7", "--inner.steps", "-9"], "dape count").inner.steps == -9
    with pytest.raises(UserError, match=re.escape(message)):
        parse(Numbers, words, "dape count")


def test_help_is_as_wide_as_the_terminal(capsys, monkeypatch):
    @dataclass(frozen=True)
    class Wordy:
        """Do a thing with so many words that a terminal of fifty columns breaks the line.

        A second paragraph begins a line.
        """

    monkeypatch.setenv("COLUMNS", "50")
    with pytest.raises(SystemExit):
        parse(Wordy, ["--help"], "dape thing")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 50 and "  A second paragraph begins a line." in lines


@dataclass(frozen=True)
class Needed:
    """Do a thing by the command `dape thing FOLDER --size 3` at-once."""

    folder: Positional[str]
    """Where."""
    size: int
    """Size."""
    again: Annotated[int, arg(name="once-more")] = 3
    """How often again."""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing: STR, --size INT (see `dape thing --help`)"),
        (["here"], "missing: --size INT (see `dape thing --help`)"),
        (["here", "--sise", "3"], "unknown option '--sise'; did you mean '--size'?"),
        (["here", "--size", "3", "--again", "4"], "unknown option '--again'"),
        (["here", "--size", "3", "--once-mor", "4"], "did you mean '--once-more'?"),
    ],
)
def test_a_missing_argument_is_named_and_an_unknown_option_first(words, message):
    assert list(options_of(Needed)) == ["--size", "--once-more"]
    with pytest.raises(UserError, match=re.escape(message)):
        parse(Needed, words, "dape thing")


@pytest.mark.parametrize("columns", [4, NARROWEST, 48])
def test_help_fits_a_narrow_terminal_and_does_not_break_code(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        parse(Needed, ["--help"], "dape thing")
    page = capsys.readouterr().out
    lines = page[page.index("  Do a thing") :].partition("\n\n")[0].splitlines()
    assert 18 <= max(map(len, lines)) <= max(NARROWEST, columns)
    if columns == 48:
        assert "  `dape thing FOLDER --size 3` at-once." in lines
