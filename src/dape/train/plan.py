"""Before training: many recipes from one, checks for the machine, and the cost of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from dape.attention.select import check_backend
from dape.data.shards import MANIFEST, Corpus
from dape.errors import UserError
from dape.positions import scheme
from dape.train import estimate, parallelize, track
from dape.train.recipe import Recipe, Retrofit, flat, override, read
from dape.train.task import draw, vocabulary


def sweep(
    recipe: str | PathLike[str] | Recipe, settings: Mapping[str, Sequence[Any]]
) -> list[Recipe]:
    """Return a recipe for each combination of values; the last key varies fastest.

    `sweep("recipes/cpu.yaml", {"model.scheme": ["kerple", "dape-kerple"], "seed": [0, 1]})` returns
    four recipes.

    Args:
        recipe: a recipe or a YAML file.
        settings: values for each key; keys are the overrides of `dape.train.train`.

    Raises:
        UserError: for a key or value that the recipe refuses, and as `check_all`.
    """
    first = recipe if isinstance(recipe, Recipe) else read(recipe, Recipe)
    recipes = [
        override(first, dict(zip(settings, values, strict=True)))
        for values in product(*settings.values())
    ]
    check_all(recipes)
    return recipes


def check_all(recipes: Sequence[Recipe]) -> None:
    """Check recipes that are to be trained one after the other.

    Raises:
        UserError: if two share a folder, several devices would train them, or `check` refuses one.
    """
    if len({recipe.folder for recipe in recipes}) < len(recipes):
        raise UserError(
            f"{_swept(recipes)} would train in one folder; give each value once, leave --out out"
            " and keep {scheme}, {seed} or a key such as {training.length} in the name"
        )
    if len(recipes) > 1 and parallelize.ranks() > 1:
        raise UserError(
            f"{_swept(recipes)} on {parallelize.ranks()} devices: several runs in one command are"
            " for one device; start a command for each"
        )
    for recipe in recipes:
        check(recipe)


def check(recipe: Recipe | Retrofit) -> None:
    """Refuse a recipe that this machine cannot follow, before anything is loaded.

    Raises:
        UserError: for an unknown scheme, option, backend or tracking service, a device that is not
            here, a batch that the devices cannot share, or a layout that fine-tuning does not have.
    """
    if isinstance(recipe, Recipe):
        scheme.check(recipe.model.scheme, recipe.model.scheme_options)
    check_backend(recipe.model.backend)
    recipe.micro_batches(recipe.groups(parallelize.ranks()))
    parallelize.device(recipe.hardware)
    track.check(recipe)
    chunks = 2 * recipe.hardware.context_parallel
    if chunks > 2 and recipe.training.length % chunks:
        raise UserError(
            f"training.length={recipe.training.length} is not a multiple of {chunks}, twice"
            f" hardware.context_parallel: each device takes two chunks of a sequence"
        )
    if isinstance(recipe, Retrofit):
        _check_layout(recipe)


def _check_layout(recipe: Retrofit) -> None:
    if parallelize.ranks() > 1 and recipe.hardware.strategy == "fsdp":
        raise UserError(
            "hardware.strategy='fsdp': adapters are not sharded; several devices take ddp, with "
            "hardware.activation_checkpointing if memory is short"
        )
    if recipe.hardware.context_parallel > 1:
        raise UserError(
            "hardware.context_parallel: sequences of pretrained models are not spread; leave it out"
        )
    if recipe.hardware.compile != "none":
        raise UserError(
            f"hardware.compile={recipe.hardware.compile!r}: the blocks of pretrained models have no"
            " common name; leave it out"
        )


def cost(recipe: Recipe, ranks: int) -> str:
    """Return parameters, tokens, FLOP and estimated memory of a recipe, as lines of text.

    The model is on the meta device, so a GPU is not needed. Prepared data is needed only for the
    size of the vocabulary.

    Args:
        recipe: the recipe.
        ranks: number of devices.

    Raises:
        UserError: if neither the recipe nor the data say how large the vocabulary is.
    """
    entries = entries_of(recipe)
    with torch.device("meta"):
        model = draw(recipe, entries)
    training, size = recipe.training, estimate.size(model)
    sequences, groups = training.batch_size, recipe.groups(ranks)
    accumulated = recipe.micro_batches(groups)
    tokens = sequences * training.length
    flops = estimate.flops_per_token(model, training.length) * tokens
    parts = estimate.memory(recipe, size.parameters, entries, ranks)
    return "\n".join(
        [
            f"run         {recipe.folder}",
            f"scheme      {recipe.model.scheme}, {size.positional:,} parameters for positions",
            f"parameters  {size.parameters:,} ({size.multiplied:,} in matrix products)",
            f"step        {tokens:,} tokens: {ranks} devices x {accumulated} micro-batches x"
            f" {sequences // (groups * accumulated)} sequences x {training.length},"
            f" {flops:.2e} FLOP",
            f"training    {training.steps:,} steps, {tokens * training.steps:,} tokens,"
            f" {flops * training.steps:.2e} FLOP",
            f"memory      about {sum(parts.values()):.3g} GiB on each device: "
            + ", ".join(f"{name} {gib:.3g}" for name, gib in parts.items()),
        ]
    )


def entries_of(recipe: Recipe) -> int:
    """Return the entries of the embedding; data need be there only where the recipe lacks them."""
    entries = recipe.model.vocab_size
    if entries is None or (Path(recipe.data) / MANIFEST).exists():
        entries = vocabulary(recipe, Corpus(recipe.data))
    return entries


def _swept(recipes: Sequence[Recipe]) -> str:
    """Return the keys that differ between recipes with all their values: `seed=0,1`."""
    values = [flat(asdict(recipe)) for recipe in recipes]
    found = {key: dict.fromkeys(str(each.get(key)) for each in values) for key in values[0]}
    swept = [f"{key}={','.join(each)}" for key, each in found.items() if len(each) > 1]
    return " ".join(swept) or f"{len(recipes)} equal recipes"
