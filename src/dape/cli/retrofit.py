"""`dape retrofit`: adapters in a pretrained model, trained at a longer length and measured."""

import shlex
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dape.cli.arguments import parse
from dape.cli.eval import show
from dape.cli.options import Lengths, at_least_one
from dape.cli.progress import progress
from dape.errors import UserError
from dape.evaluate.lengths import doubled
from dape.files import check_writable
from dape.strict import default
from dape.train.recipe import Retrofit
from dape.train.recipe import read as read_recipe

if TYPE_CHECKING:
    from dape.data.shards import Corpus
    from dape.evaluate.subject import Model

PROG = "dape retrofit MODEL"
BEYOND = 4  # default longest window, as a multiple of the longer training length


@dataclass(frozen=True, slots=True)
class Arguments:
    """Train adapters in a pretrained model, and measure the model without and with adapters.

    MODEL is a folder, a run folder or a name on the Hugging Face hub. `--recipe FILE.yaml` gives
    values for absent options. Untrained adapters leave the model unchanged. Trained adapters go to
    RUN/adapters. The same command again resumes an interrupted run.
    """

    recipe: Annotated[Retrofit, tyro.conf.arg(name="")]
    lengths: Annotated[Lengths, default("both training lengths, doubled up to 4 times")] = ()
    """tokens in a measured window"""
    protocol: Literal["last", "non_overlapping"] = "last"
    """scored tokens of a window: the last 256, or all"""
    documents: int = 100
    """largest number of documents of the test split"""
    blocks: int = 4
    """largest number of blocks of scored tokens in a document"""
    measure: Literal["both", "run", "none"] = "both"
    """models to measure: the base and the run, the run alone, or none"""

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        at_least_one(self, "documents", "blocks")


def main(argv: list[str]) -> None:
    """Check everything, fine-tune, then measure."""
    run(read(argv))


def read(argv: list[str]) -> Arguments:
    """Return the recipe of `--recipe` for the model named first, changed by the options."""
    if argv and argv[0] in ("-h", "--help"):
        return parse(Arguments, argv, PROG, Arguments(Retrofit()))
    if not argv or argv[0].startswith("-"):
        raise UserError(f"name a model first: `{PROG} [--recipe FILE.yaml] [--section.key value]`")
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", type=Path)
    try:
        found, rest = parser.parse_known_args(argv[1:])
    except ArgumentError:
        raise UserError("--recipe needs a file") from None
    recipe = read_recipe(found.recipe, Retrofit) if found.recipe else Retrofit()
    named = replace(recipe, model=replace(recipe.model, base=str(Path(argv[0]))))
    return parse(Arguments, rest, PROG, Arguments(named))


def run(arguments: Arguments) -> None:
    """Fine-tune unless finished, and measure the base and the run on the same tokens."""
    from transformers.utils import logging

    from dape.evaluate.opening import open_model
    from dape.ranks import is_first_rank
    from dape.train import plan
    from dape.train.run import check_folder, finetune

    logging.disable_progress_bar()  # progress bars of loading
    recipe = arguments.recipe
    plan.check(recipe)
    base = open_model(Path(recipe.model.base))
    corpus = base.corpus(recipe.data)
    check_folder(recipe, {"path": recipe.data, "checksum": corpus.checksum})
    lengths = arguments.lengths or default_lengths(base.train_length, recipe.training.length)
    if arguments.measure != "none":
        check_measurement(arguments, base, corpus, lengths)
    finetune(recipe.model.base, recipe)
    if arguments.measure != "none" and is_first_rank():
        measure(arguments, corpus, lengths)


def check_measurement(
    arguments: Arguments, base: "Model", corpus: "Corpus", lengths: Sequence[int]
) -> None:
    """Refuse unwritable results of the base, and lengths beyond every document."""
    from dape.evaluate.plan import plan
    from dape.evaluate.protocols import protocol

    if arguments.measure == "both":
        check_writable(
            base.folder.evaluation(arguments.protocol),
            remedy="copy the model to a folder of yours, for the results of the base",
        )
    rule, documents = protocol(arguments.protocol, lengths), arguments.documents
    plan(corpus, "test", rule, lengths, documents=documents, blocks=arguments.blocks, seed=0)


def measure(arguments: Arguments, corpus: "Corpus", lengths: Sequence[int]) -> None:
    """Measure the base and the run in the precision of the run, and print the table."""
    from dape.device import choose_device
    from dape.evaluate.evaluation import evaluate
    from dape.evaluate.opening import open_model

    recipe = arguments.recipe
    precision = open_model(recipe.folder).precision(choose_device(recipe.hardware.device))
    with progress() as watch:
        evaluations = evaluate(
            measured(arguments),
            corpus,
            lengths,
            arguments.protocol,
            documents=arguments.documents,
            blocks=arguments.blocks,
            device=recipe.hardware.device,
            precision=precision,
            command=command(arguments, lengths, precision),
            watch=watch,
        )
    show(evaluations, "perplexity")


def measured(arguments: Arguments) -> list[str]:
    """Return the folders of the measured models."""
    recipe = arguments.recipe
    base = [recipe.model.base] if arguments.measure == "both" else []
    return [*base, str(recipe.folder)]


def command(arguments: Arguments, lengths: Sequence[int], precision: str) -> str:
    """Return the arguments of `dape eval` for the measured models."""
    recipe = arguments.recipe
    words = [
        *("dape", "eval", *measured(arguments)),
        *("--data", recipe.data),
        *("--lengths", ",".join(map(str, lengths))),
        *("--protocol", arguments.protocol),
        *("--documents", str(arguments.documents), "--blocks", str(arguments.blocks)),
        *("--device", recipe.hardware.device, "--precision", precision),
    ]
    return shlex.join(words)


def default_lengths(before: int | None, after: int) -> list[int]:
    """Return the shorter training length, doubled up to 4 times the longer training length."""
    known = [length for length in (before, after) if length]
    return doubled(min(known), BEYOND * max(known))
