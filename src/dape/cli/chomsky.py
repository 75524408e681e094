"""`dape chomsky`: the Chomsky-hierarchy benchmark, a command for each step."""

from importlib import import_module

from dape.errors import UserError, unknown

COMMANDS = {
    "tasks": "the fifteen tasks, and what is scored without reading the input",
    "sample": "examples of a task, to check by hand",
    "train": "models, trained and tested from a recipe",
    "table": "the same, then the table and the figures",
}


def usage() -> str:
    """Return the page that `dape chomsky --help` prints."""
    rows = "\n".join(f"  {name:<7} {text}" for name, text in COMMANDS.items())
    return (
        f"usage: dape chomsky COMMAND ...\n\n{rows}\n\n`dape chomsky COMMAND --help` explains one."
    )


def main(argv: list[str]) -> int | None:
    """Run one step."""
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not argv:
        raise UserError(f"name a step: dape chomsky {', '.join(COMMANDS)}")
    if argv[0] not in COMMANDS:
        raise unknown("step of dape chomsky", argv[0], COMMANDS)
    status: int | None = import_module(f"dape.cli.chomsky_{argv[0]}").main(argv[1:])
    return status
