"""`dape train`: a language model from a recipe."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from dape.cli.arguments import parse
from dape.errors import UserError
from dape.train import config
from dape.train.config import Recipe

PROG = "dape train RECIPE.yaml"


@dataclass(frozen=True, slots=True)
class Arguments:
    """Train a language model from a recipe; the same command again resumes an interrupted run.

    Several schemes, `--model.scheme kerple,dape-kerple`, are trained one after the other.
    On several devices: `torchrun ... -m dape train RECIPE.yaml ...`, a process for each.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    dry_run: bool = False
    """print parameters, tokens, steps and memory, and stop"""


def main(argv: list[str]) -> int | None:
    """Check everything, then train; of several ranks the first alone reports an error."""
    arguments = read(argv)
    from dape.train.parallelize import is_first_rank

    try:
        runs = sweep(arguments)
        for one in runs:
            check(one)
        for one in runs:
            run(one)
        return 0
    except UserError:
        if is_first_rank():
            raise
        return 2


def read(argv: list[str]) -> Arguments:
    """Return the recipe of the file that is named first, with the options put over it."""
    if argv and argv[0] in ("-h", "--help"):
        return parse(Arguments, argv, PROG, Arguments(Recipe()))
    if not argv or argv[0].startswith("-"):
        raise UserError(f"name a recipe first: `{PROG} [--section.key value]`")
    return parse(Arguments, argv[1:], PROG, Arguments(config.read(Path(argv[0]))))


def sweep(arguments: Arguments) -> list[Arguments]:
    """Return a run for each of the schemes, which a comma separates.

    Raises:
        UserError: if they would share a folder, or several devices would train them.
    """
    from dape.train import parallelize

    recipe = arguments.recipe
    models = [replace(recipe.model, scheme=scheme) for scheme in recipe.model.scheme.split(",")]
    runs = [replace(arguments, recipe=replace(recipe, model=model)) for model in models]
    if len({run.recipe.folder for run in runs}) < len(runs):
        raise UserError(
            f"model.scheme={recipe.model.scheme} would train in one folder; name each scheme once,"
            " leave --out out and keep {scheme} in the name"
        )
    if len(runs) > 1 and parallelize.ranks() > 1:
        raise UserError(
            f"model.scheme={recipe.model.scheme} on {parallelize.ranks()} devices: several schemes"
            " in one command are for one device; start a command for each"
        )
    return runs


def check(arguments: Arguments) -> None:
    """Raise a `UserError` for a recipe that this machine cannot run, before anything is loaded."""
    from dape.attention.select import select
    from dape.positions import scheme
    from dape.train import parallelize, track

    recipe = arguments.recipe
    scheme.check(recipe.model.scheme, recipe.model.scheme_options)
    select(recipe.model.backend)
    recipe.micro_batches(parallelize.ranks())
    parallelize.device(recipe.hardware)
    track.check(recipe)


def run(arguments: Arguments) -> None:
    """Check the recipe against the data and the run folder, then train."""
    from dape.train import folder, parallelize

    recipe = arguments.recipe
    if arguments.dry_run:
        print(cost(recipe, parallelize.ranks()))
        return
    from dape.data.shards import Corpus

    corpus = Corpus(recipe.data)
    vocabulary(recipe, corpus.vocab_size)
    folder.check(recipe, corpus.checksum)
    done = folder.record(recipe.folder)
    if not done.get("ended"):
        from dape.train.loop import train

        train(recipe, corpus)
        done = folder.record(recipe.folder)
    if parallelize.is_first_rank():
        print(
            f"{recipe.folder} is finished: {done['step']} steps, {done['tokens']:,} tokens,"
            f" validation loss {done['validation_loss']:.4f}; measure it: dape eval {recipe.folder}"
        )


def vocabulary(recipe: Recipe, needed: int) -> int:
    """Return the entries of the embedding; `UserError` if they are fewer than the tokenizer's."""
    entries = recipe.model.vocab_size or needed
    if entries < needed:
        raise UserError(
            f"model.vocab_size={entries} is less than the {needed} tokens of {recipe.data}; leave"
            " it out to take as many"
        )
    return entries


def cost(recipe: Recipe, ranks: int) -> str:
    """Return what the recipe amounts to, from the model on the meta device; needs no GPU.

    Data that is not prepared yet is needed only to know the vocabulary.
    """
    import torch

    from dape.train import estimate
    from dape.train.loop import build

    entries = recipe.model.vocab_size
    if entries is None or (Path(recipe.data) / "manifest.json").exists():
        from dape.data.shards import Corpus

        entries = vocabulary(recipe, Corpus(recipe.data).vocab_size)
    with torch.device("meta"):
        model = build(recipe, entries)
    training, size = recipe.training, estimate.size(model)
    sequences, accumulated = training.batch_size, recipe.micro_batches(ranks)
    tokens = sequences * training.length
    flops = estimate.flops_per_token(model, training.length) * tokens
    parts = estimate.memory(recipe, size.parameters, entries, ranks)
    return "\n".join(
        [
            f"run         {recipe.folder}",
            f"scheme      {recipe.model.scheme}, {size.positional:,} parameters for positions",
            f"parameters  {size.parameters:,} ({size.multiplied:,} in matrix products)",
            f"step        {tokens:,} tokens: {ranks} devices x {accumulated} micro-batches x"
            f" {sequences // (ranks * accumulated)} sequences x {training.length},"
            f" {flops:.2e} FLOP",
            f"training    {training.steps:,} steps, {tokens * training.steps:,} tokens,"
            f" {flops * training.steps:.2e} FLOP",
            f"memory      about {sum(parts.values()):.3g} GiB on each device: "
            + ", ".join(f"{name} {gib:.3g}" for name, gib in parts.items()),
        ]
    )
