"""The `dape` command: which command some words are, and what a mistake looks like on any screen."""

import errno
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from importlib import import_module

import pytest
import torch

import dape
from dape import cli

MISTAKES = [
    (
        ["eval", "ref", "--protocol", "foo"],
        "--protocol: invalid choice 'foo', not one of 'last', 'sl",
    ),
    (
        ["eval", "ref", "--lengths", "0"],
        "--lengths: '0' is not a list of lengths; expected --lengths",
    ),
    (["eval", "ref", "--seed"], "Missing value: expected --seed INT (default: 0)"),
    (["eval", "ref", "--trials", "3"], "unknown option '--trials'"),
    (["eval", "retrieval", "ref", "--trials", "many"], "--trials: invalid literal for int()"),
    (["export", "ref"], "missing: --out PATH (see `dape export --help`)"),
    (["plot", "encoding"], "missing: NAME (see `dape plot encoding --help`)"),
    (["plot", "ref", "--out", "x.jpg"], "--out x.jpg: the name must end in .png"),
    (
        ["bench", "attention", "--dtype", "int8"],
        "--dtype: invalid choice 'int8', not one of 'bf16'",
    ),
    (["nothing"], "unknown command 'nothing'"),
]
# Each mistake in one process, which has the imports behind it.
GIVEN = "; ".join(f"main({argv!r})" for argv, _ in MISTAKES)
SCRIPT = f"from dape.cli import main; {GIVEN}"


def on_terminal(columns, colour):
    """Return the lines that the mistakes leave on a terminal so wide."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    env |= {"TERM": "xterm-256color", **({} if colour else {"NO_COLOR": "1"})}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=slave, stdout=slave, stderr=slave, env=env
    )
    os.close(slave)
    written = b""
    while piece := read(master):
        written += piece
    assert process.wait() == 0
    os.close(master)
    return written.decode().replace("\r\n", "\n").splitlines()


def read(master):
    """Return what was written to the terminal next, nothing at the end."""
    try:
        return os.read(master, 65536)
    except OSError as error:
        assert error.errno == errno.EIO  # how Linux says that no process has it open
        return b""


def closed(descriptors, *words):
    """Run a command whose outputs a shell has closed."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {descriptors}', "sh", sys.executable, "-m", "dape", *words],
        capture_output=True,
        text=True,
    )


def test_a_command_runs_with_closed_outputs():
    assert closed("2>&-", "--version").stdout == f"dape {dape.__version__}\n"
    assert closed(">&- 2>&-", "--version").returncode == 0
    mistake = closed(">&-", "nothing")
    assert mistake.returncode == 2 and mistake.stderr.startswith("dape: error: unknown command")


@pytest.mark.parametrize(
    "words",
    [
        ["explore", "--out", "\udce9.html"],
        ["prepare", "text", "--out", "\udcc3\udca9"],
        ["train", "recipes/demo.yaml", "--out", "runs/\udce9"],
    ],
)
def test_a_word_that_is_not_utf_8_is_refused_before_the_work(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    line = capsys.readouterr().err
    assert line == (
        f"dape: error: {words[-1]!a} is not UTF-8; set PYTHONUTF8=1, or rename the file or folder\n"
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("columns", [24, 200])
@pytest.mark.parametrize("colour", [True, False])
def test_a_mistake_is_the_same_line_on_a_terminal_as_in_a_pipe(capsys, columns, colour):
    assert [cli.main(argv) for argv, _ in MISTAKES] == [2] * len(MISTAKES)
    piped = capsys.readouterr().err.splitlines()
    for line, (_, message) in zip(piped, MISTAKES, strict=True):
        assert line.startswith(f"dape: error: {message}")
    assert on_terminal(columns, colour) == piped


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_module_whose_help_names_it(name, capsys):
    for words in ([*name.split(), "--help"], ["help", *name.split()]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
        page = " ".join(capsys.readouterr().out.split())
        assert page.startswith(f"usage: dape {name}")
    assert import_module(f"dape.cli.{name.replace(' ', '_')}").__doc__.startswith(f"`dape {name}`")


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        ("eval", "--protocol", ("--trials", "--limit", "--tasks")),
        ("eval retrieval", "--trials", ("--protocol", "--limit", "--blocks")),
        ("eval harness", "--limit", ("--protocol", "--trials", "--split", "--data")),
        ("plot", "--protocol", ("--heads", "--task")),
        ("info", "--help", ("--schemes",)),
    ],
)
def test_help_lists_the_options_of_its_command_alone(name, has, lacks, capsys):
    with pytest.raises(SystemExit):
        cli.main([*name.split(), "--help"])
    page = capsys.readouterr().out
    assert has in page and not [option for option in lacks if f"{option} " in page]


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(words, capsys):
    assert cli.main(words) == 0
    page = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if f"  dape {name} " not in page] == []


def test_words_that_begin_commands_list_them(capsys):
    assert cli.main(["bench", "--help"]) == 0
    page = capsys.readouterr().out
    assert "bench attention" in page and "retrofit" not in page


def test_the_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dape {dape.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "RUN", "--retrieval", "passkey"], "is now `dape eval retrieval RUN... --tasks"),
        (["eval", "RUN", "--harness=wikitext"], "is now `dape eval harness RUN... --tasks"),
        (["info", "--schemes"], "`dape info --schemes` is now `dape info schemes`"),
        (["evla"], "unknown command 'evla'; did you mean 'eval'?"),
        (["bench"], "`dape bench` needs a further word: attention"),
        (["bench", "atention"], "did you mean 'attention'?"),
        (["--verbose"], "unknown command '--verbose'"),
    ],
)
def test_what_is_no_command_is_one_line_that_names_one(words, message, capsys):
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "runs/a: No space left on"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/b"), "runs/b: Permission denied"),
        (OSError("two\nlines"), "two lines"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error, message, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("dape.cli.info.main", fail)
    assert cli.main(["info"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dape: error: {message}")


def test_an_error_of_ours_is_not_hidden(monkeypatch):
    def fail(*_):
        raise RuntimeError("a fault in the program")

    monkeypatch.setattr("dape.cli.info.main", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["info"])


def test_a_terminal_without_signs_beyond_ascii_ends_no_command():
    code = "from dape.cli import main; import dape.cli.info as info; "
    code += "info.main = lambda argv: print('1 ± 2'); main(['info'])"
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == ("1 ? 2\n", "")
