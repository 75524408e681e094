"""The `dape` command: one module per subcommand, imported only when it is called."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from dape.errors import UserError, unknown

COMMANDS = {
    "prepare": "text to tokens: memory-mapped shards with a manifest",
    "train": "train a language model from a recipe",
    "retrofit": "adapters in a pretrained model, trained at a longer length",
    "eval": "perplexity over length of one or more runs",
    "plot": "evaluated runs, or an encoding, as a figure",
    "paper": "the paper's tables and figures, each by one command",
    "chomsky": "the Chomsky-hierarchy benchmark: fifteen tasks in which position is everything",
    "export": "a run as a Hugging Face folder with a model card",
    "bench": "speed and memory of attention, against named peers",
    "info": "versions, devices, attention backends, schemes",
}


def usage() -> str:
    """Return the page that `dape --help` prints."""
    rows = "\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())
    return f"usage: dape COMMAND ...\n\n{rows}\n\n`dape COMMAND --help` explains one.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; a `UserError` becomes one line on stderr and status 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0
    try:
        if args[0] not in COMMANDS:
            raise unknown("command", args[0], COMMANDS)
        return import_module(f"dape.cli.{args[0]}").main(args[1:]) or 0
    except UserError as error:
        print(f"dape: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who reads, `head` say, has enough; without this the interpreter's last flush complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
