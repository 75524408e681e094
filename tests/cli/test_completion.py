"""`dape --completion`: what bash makes of its script, and every option of every command."""

import shutil
import subprocess

import pytest

from dape import cli

SECOND = [name.split()[1] for name in cli.COMMANDS if name.startswith("bench ")]
COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_dape
echo "${COMPREPLY[*]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    from dape.cli.completion import script

    file = tmp_path_factory.mktemp("completion") / "dape.sh"
    file.write_text(script(cli.COMMANDS))
    return file


def completed(script, *words, shell="bash"):
    done = subprocess.run(
        [shell, "-c", COMPLETE, shell, script, "dape", *words], capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_the_command_prints_the_script(script, capsys):
    assert cli.main(["--completion"]) == 0
    assert capsys.readouterr().out == script.read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash, and none is on the PATH")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ev"], ["eval"]),
        (["eval", "ret"], ["retrieval"]),
        (["eval", "--proto"], ["--protocol"]),
        (["eval", "retrieval", "--tas"], ["--tasks"]),
        (["eval", "retrieval", "--protocol"], []),
        (["eval", "runs/a", "--strid"], ["--stride"]),
        (["eval", "runs/a", "retri"], []),
        (["train", "recipes/demo.yaml", "--model.scheme-o"], ["--model.scheme-options"]),
        (["chomsky", "train", "recipes/chomsky.yaml", "--tog"], ["--together"]),
        (["prepare", "--tok"], ["--tokenizer"]),
        (["chomsky", ""], ["tasks", "sample", "train", "table", "map"]),
    ],
)
def test_words_are_completed(script, words, expected):
    assert completed(script, *words) == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash, and none is on the PATH")
def test_every_command_is_offered(script):
    firsts = {name.partition(" ")[0] for name in cli.COMMANDS}
    assert set(completed(script, "")) == firsts | {"--help", "--version", "--completion"}
