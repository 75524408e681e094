"""`dape train`: a language model from a recipe."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import tyro

from dape.cli.arguments import parse
from dape.errors import UserError
from dape.text import counted
from dape.train.recipe import Recipe, read

if TYPE_CHECKING:
    from dape.runs import RunFolder

PROG = "dape train RECIPE.yaml"
BRACKETS = {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}


@dataclass(frozen=True, slots=True)
class Arguments:
    """Train a language model from a recipe; the same command again resumes an interrupted run.

    Values separated by commas, as in `--model.scheme kerple,dape-kerple --seed 0,1`, train a run
    for every combination, in turn. `torchrun ... -m dape train RECIPE.yaml ...` trains on several
    devices, with a process per device.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    dry_run: bool = False
    """print parameters, tokens, steps and memory, and stop"""
    measure: bool = False
    """print time and memory of a step for all fitting micro-batch sizes, and stop"""


def main(argv: list[str]) -> None:
    """Check everything, then train."""
    if argv and argv[0] in ("-h", "--help"):
        parse(Arguments, argv, PROG, Arguments(Recipe()))
    runs = [parsed(words) for words in combinations(argv)]
    from dape.ranks import is_first_rank
    from dape.train.plan import check_all

    check_all([each.recipe for each in runs])
    for each in runs:
        run(each, is_first_rank())


def parsed(argv: list[str]) -> Arguments:
    """Return the recipe of the file named first, changed by the options."""
    if not argv or argv[0].startswith("-"):
        raise UserError(f"name a recipe first: `{PROG} [--section.key value]`")
    return parse(Arguments, argv[1:], PROG, Arguments(read(argv[0], Recipe)))


def combinations(argv: list[str]) -> Iterator[list[str]]:
    """Yield the arguments for every combination of comma-separated values."""
    first, options = argv[:1], argv[1:]
    return (first + list(words) for words in product(*map(values, options)))


def values(word: str) -> list[str]:
    """Return the values in a word, separated by commas outside brackets.

    In `--seed=0,1`, the values keep the option, as `--seed=0` and `--seed=1`.
    """
    name, sign, text = word.partition("=") if word.startswith("--") else ("", "", word)
    depth, parts = 0, [""]
    for letter in text:
        depth += BRACKETS.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [name + sign + part for part in parts]


def run(arguments: Arguments, speaks: bool) -> None:
    """Train, or print the cost; only a process that `speaks` for all prints."""
    from dape.ranks import ranks
    from dape.train.plan import cost
    from dape.train.run import train

    if arguments.dry_run:
        text = cost(arguments.recipe, ranks())
        if speaks:
            print(text)
        return
    if arguments.measure:
        measured(arguments.recipe, speaks)
        return
    folder = train(arguments.recipe)
    if speaks:
        print(ending(folder))


def ending(folder: "RunFolder") -> str:
    """Return the outcome of a training in a line.

    Raises:
        UserError: for a damaged record.
    """
    done = folder.read_record()
    try:
        return (
            f"{folder} is finished: {counted(done['step'], 'step')}, {done['tokens']:,} tokens,"
            f" validation loss {done['validation_loss']:.4f}; to measure: dape eval"
            f" {quote(str(folder))}"
        )
    except KeyError as error:
        raise UserError(
            f"{folder.record} is damaged ({error} is missing); run the command of the run again,"
            " under another --name"
        ) from None


def measured(recipe: Recipe, speaks: bool) -> None:
    """Print time and memory by size of the micro-batch, and the fastest size."""
    from dape.train.measure import measure

    found = []
    for reading in measure(recipe):
        found.append(reading)
        if speaks:
            print(reading, flush=True)
    if speaks:
        fastest = max(found, key=lambda each: each.tokens_per_second)
        print(f"the fastest: --hardware.micro-batch-size {fastest.micro_batch_size}")
