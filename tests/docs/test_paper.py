"""The page on the paper's experiments names them all, and its commands can be given."""

import re
import shlex

import pytest
from pages import text

from dape.cli.arguments import parse
from dape.cli.paper import Arguments
from dape.paper.experiments import EXPERIMENTS

PAGE = "docs/paper.md"
COMMANDS = re.findall(r"dape paper (?!NAME)([^`#\n]*)", text(PAGE))


def test_every_experiment_is_on_the_page():
    named = {word for command in COMMANDS for word in command.split()}
    assert set(EXPERIMENTS) <= named


@pytest.mark.parametrize("command", sorted({command.strip() for command in COMMANDS}))
def test_its_commands_can_be_given(command):
    if command not in ("list", "report"):
        assert set(parse(Arguments, shlex.split(command), "dape paper").names) <= set(EXPERIMENTS)


def test_its_options_are_those_there_are():
    options = set(re.findall(r"^\| `(--\w+)", text(PAGE), flags=re.MULTILINE))
    assert options == {f"--{name}" for name in Arguments.__dataclass_fields__} - {
        "--names",
        "--scale",
        "--data",
    }
