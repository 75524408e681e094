"""The `dape` command, with a module per command, imported on demand."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from types import FrameType
from typing import TextIO

from dape.errors import RankError, UserError, of_a_peer, out_of_memory, unknown
from dape.ranks import rank, ranks
from dape.text import one_line

# `dape eval retrieval` is `main` of cli/eval_retrieval.py, called with the words after the name.
COMMANDS = {
    "prepare": "text to tokens: memory-mapped shards with a manifest",
    "train": "train a language model from a recipe",
    "retrofit": "adapters in a pretrained model, trained at a longer length",
    "eval": "perplexity over length, for any number of models",
    "eval retrieval": "whether models find a number hidden in a long text",
    "eval harness": "tasks of lm-eval at several lengths",
    "eval context": "whether models use far text",
    "plot": "evaluated runs as a figure, a table or a report",
    "plot retrieval": "hidden numbers over depth and length",
    "plot encoding": "a position encoding as a picture",
    "plot learned": "A, B and f(A, B) of a trained model",
    "plot context": "the use of far text, over distance",
    "explore": "encodings with sliders, and a model on a text, in a browser",
    "paper": "the paper's tables and figures, by experiment",
    "paper list": "the experiments behind them",
    "paper report": "a page on all experiments",
    "chomsky tasks": "the fifteen tasks of the Chomsky-hierarchy benchmark",
    "chomsky sample": "examples of a task, to check by hand",
    "chomsky train": "train encoders on tasks, by task, scheme and seed",
    "chomsky table": "scores over length as a table and figures",
    "chomsky map": "A, B and f(A, B) of a trained encoder",
    "export": "a run as a Hugging Face folder with a model card",
    "bench attention": "speed and memory of attention, against named peers",
    "bench model": "time and memory of whole models, by scheme and length",
    "info": "versions, devices and attention backends",
    "info schemes": "schemes, with paper and parameters",
}
# Options of earlier versions, and the commands in their place.
MOVED = {
    ("eval", "--retrieval"): "eval retrieval RUN... --tasks TASKS",
    ("eval", "--harness"): "eval harness RUN... --tasks TASKS",
    ("info", "--schemes"): "info schemes",
}
COMPLETION = "`dape --completion > FILE` and `source FILE` complete words in bash and zsh."
TOGETHER = ("train", "retrofit", "eval")  # the commands of several processes
CONTINUED = "give the same command again to go on"
HELP = ("-h", "--help", "help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a mistake becomes a line on stderr and status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.pop("MPLBACKEND", None)  # figures are files; a wrong name would end the command
    # A shell that closes a stream, as `dape ... >&-`, leaves None.
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # for ASCII terminals
    # The first process of a machine reports an error of all: files of machines may differ.
    first = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    try:
        with _terminable() if ranks() == 1 else _terminable_beside_others():
            return _run(words)
    except UserError as error:
        return _fail(str(error)) if first or isinstance(error, RankError) else 2
    except KeyboardInterrupt as stop:
        if first:
            print(f"dape: {str(stop) or 'interrupted'}; {CONTINUED}", file=sys.stderr)
        return 143 if str(stop) else 130
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe; the interpreter's last flush would
        # complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}; mend the cause and run the command again")
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            return _fail("out of memory; take smaller batches, shorter lengths or a smaller model")
        if ranks() == 1 or not of_a_peer(error):
            raise
        return _fail(f"rank {rank()} of {ranks()}: another process has ended; {CONTINUED}")


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM, the signal of a time limit, into an interrupt from the keyboard."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminable_beside_others() -> AbstractContextManager[None]:
    """Return the context in which SIGTERM ends a process of several."""
    from dape.train.faults import ended_by_sigterm

    return ended_by_sigterm(f"rank {rank()} of {ranks()}: ", lambda: CONTINUED)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt("stopped by SIGTERM")


def _run(words: list[str]) -> int:
    _check_text(words)
    if words == ["--version"]:
        from dape import __version__

        print(f"dape {__version__}")
        return 0
    if words == ["--completion"]:
        from dape.cli.completion import script

        print(script(COMMANDS), end="")
        return 0
    if not words or words[0] in HELP:
        words = [*words[1:], "--help"]
    name, rest = _command(words)
    if name not in COMMANDS:
        print(_usage(name), end="")
        return 0
    if name not in TOGETHER and ranks() > 1:
        raise UserError(
            f"`dape {name}` is the work of a single process, and the environment has WORLD_SIZE="
            f"{ranks()}; start the command without torchrun, or unset WORLD_SIZE"
        )
    return import_module(f"dape.cli.{name.replace(' ', '_')}").main(rest) or 0


def _check_text(words: list[str]) -> None:
    """Raise a `UserError` for a word that is not UTF-8, because files name it and are UTF-8."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{word!a} is not UTF-8; set PYTHONUTF8=1, or rename the file or folder"
            ) from None


def _command(words: list[str]) -> tuple[str, list[str]]:
    """Return the command at the beginning of the words, and the remaining words.

    For a page of help, the command may be the common first word of several commands, or empty.

    Raises:
        UserError: for an unknown command, or an option of an earlier version.
    """
    first, *rest = words
    for option in (word.partition("=")[0] for word in rest):
        if (first, option) in MOVED:
            raise UserError(f"`dape {first} {option}` is now `dape {MOVED[first, option]}`")
    if rest and f"{first} {rest[0]}" in COMMANDS:
        return f"{first} {rest[0]}", rest[1:]
    if first in COMMANDS:
        return first, rest
    if first in HELP:
        return "", []
    family = [name.removeprefix(f"{first} ") for name in COMMANDS if name.startswith(f"{first} ")]
    if not family:
        raise unknown("command", first, {name.partition(" ")[0] for name in COMMANDS})
    if rest and rest[0] in HELP:
        return first, []
    if not rest:
        raise UserError(f"`dape {first}` needs a further word: {', '.join(family)}")
    raise unknown(f"command after `dape {first}`:", rest[0], family)


def _usage(first: str = "") -> str:
    """Return the list of all commands, or of the commands with a common first word."""
    rows = "\n".join(
        f"  dape {name:<16} {text}" for name, text in COMMANDS.items() if name.startswith(first)
    )
    explained = "`dape COMMAND --help` explains a command."
    return f"usage: dape COMMAND ...\n\n{rows}\n\n{explained}\n{COMPLETION}\n"


def _fail(message: str) -> int:
    print(f"dape: error: {one_line(message)}", file=sys.stderr)
    return 2
