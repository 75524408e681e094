"""Before training: sweeps of recipes, checks for the machine, and the cost of a run."""

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
from dape.ranks import ranks
from dape.text import counted
from dape.train import estimate, parallelize, track
from dape.train.recipe import Recipe, Retrofit, flat, override, read
from dape.train.sections import Base
from dape.train.task import draw, vocabulary


def sweep(
    recipe: str | PathLike[str] | Recipe, settings: Mapping[str, Sequence[Any]]
) -> list[Recipe]:
    """Return a recipe per combination of values; the last key varies fastest.

    `sweep("recipes/cpu.yaml", {"model.scheme": ["kerple", "dape-kerple"], "seed": [0, 1]})` returns
    four recipes.

    Args:
        recipe: a recipe or a YAML file.
        settings: the values of each key; keys are the overrides of `dape.train.train`.

    Raises:
        UserError: for an invalid key or value, and as `check_all`.
    """
    first = recipe if isinstance(recipe, Recipe) else read(recipe, Recipe)
    recipes = [
        override(first, dict(zip(settings, values, strict=True)))
        for values in product(*settings.values())
    ]
    check_all(recipes)
    return recipes


def check_all(recipes: Sequence[Recipe]) -> None:
    """Check recipes before training them in turn.

    Raises:
        UserError: for recipes with the same folder, several recipes on several devices, or a recipe
            refused by `check`.
    """
    if len({recipe.folder for recipe in recipes}) < len(recipes):
        raise UserError(
            f"{_swept(recipes)} would share a folder; give each value once, leave --out out"
            " and keep {scheme}, {seed} or a key such as {training.length} in the name"
        )
    if len(recipes) > 1 and ranks() > 1:
        raise UserError(
            f"{_swept(recipes)} on {ranks()} devices: several recipes in a command"
            " need a single device; give a command for each recipe"
        )
    for recipe in recipes:
        check(recipe)


def check(recipe: Recipe | Retrofit) -> None:
    """Refuse a recipe that cannot run on this machine, before anything is loaded.

    Raises:
        UserError: for an unknown scheme, adapter, option, backend or tracking service, an absent
            device, a batch not divisible over the devices, or a layout unknown to fine-tuning.
    """
    if isinstance(recipe, Recipe):
        _check_scheme(recipe)
    else:
        _check_adapter(recipe.model)
    check_backend(recipe.model.backend)
    recipe.micro_batches(recipe.groups(ranks()))
    parallelize.device(recipe.hardware)
    track.check(recipe)
    chunks = 2 * recipe.hardware.context_parallel
    if chunks > 2 and recipe.training.length % chunks:
        raise UserError(
            f"training.length={recipe.training.length} is not a multiple of {chunks}, twice"
            f" hardware.context_parallel; a device takes two chunks of a sequence"
        )
    if isinstance(recipe, Retrofit):
        _check_layout(recipe)


def _check_scheme(recipe: Recipe) -> None:
    """Build the modules of a scheme without memory, to check the options."""
    sizes, options = recipe.model, recipe.model.scheme_options
    scheme.check(sizes.scheme, options)
    dimensions = {
        "num_heads": sizes.num_attention_heads,
        "head_dim": sizes.hidden_size // sizes.num_attention_heads,
        "hidden_size": sizes.hidden_size,
        "train_length": recipe.training.length,
    }
    with torch.device("meta"):
        for place in scheme.PLACES:
            scheme.resolve(sizes.scheme).build(place, dimensions, options)


def _check_adapter(chosen: Base) -> None:
    from dape.model.retrofit.choice import Choice

    if chosen.adapter is not None:
        Choice(chosen.adapter, chosen.bias, chosen.options).check()


def check_memory(recipe: Recipe | Retrofit) -> None:
    """Refuse a batch or a model too large for the memory of a device.

    Raises:
        UserError: naming the size of the part, and the memory.
    """
    training, hardware = recipe.training, recipe.hardware
    rows = training.batch_size // recipe.groups(ranks())
    tokens = 2 * 8 * rows * (training.length + 1)  # windows of 64-bit tokens, and their stack
    _fit({"training.batch_size": tokens}, torch.device("cpu"))
    if isinstance(recipe, Recipe):
        width, layers = recipe.model.hidden_size, recipe.model.num_hidden_layers
        entries = recipe.model.vocab_size or 1
        micro = hardware.micro_batch_size or rows
        parts = {
            "model": 4 * width * (4 * width * layers + entries),  # matrices of the block
            # The input of a layer in 16 bits.
            "hardware.micro_batch_size": 2
            * micro
            * training.length
            * width
            // hardware.context_parallel,
        }
        _fit(parts, parallelize.device(hardware))


def _fit(parts: dict[str, int], device: torch.device) -> None:
    """Raise a `UserError` for a part larger than the memory of a device."""
    memory = estimate.memory_of(device)
    for name, size in parts.items():
        if size > memory:
            raise UserError(
                f"{name} takes {size / 2**30:,.0f} GiB at least, and {device} has"
                f" {memory / 2**30:,.0f} GiB; take a smaller value"
            )


def _check_layout(recipe: Retrofit) -> None:
    if ranks() > 1 and recipe.hardware.strategy == "fsdp":
        raise UserError(
            "hardware.strategy='fsdp': adapters are not sharded; several devices take ddp, with "
            "hardware.activation_checkpointing=blocks if memory is short"
        )
    if recipe.hardware.context_parallel > 1:
        raise UserError(
            "hardware.context_parallel: devices cannot share sequences of a pretrained model; "
            "leave the option out"
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
    accumulated, each = recipe.micro_batches(groups), ranks // groups
    devices = (
        counted(ranks, "device")
        if each == 1
        else f"{counted(groups, 'group')} of {counted(each, 'device')}"
    )
    tokens = sequences * training.length
    flops = estimate.flops_per_token(model, training.length) * tokens
    parts = estimate.memory(recipe, size.parameters, entries, ranks)
    return "\n".join(
        [
            f"run         {recipe.folder}",
            f"scheme      {recipe.model.scheme}, {size.positional:,} parameters for positions",
            f"parameters  {size.parameters:,} ({size.multiplied:,} in matrix products)",
            f"step        {tokens:,} tokens: {devices} x"
            f" {counted(accumulated, 'micro-batch', 'es')} x"
            f" {counted(sequences // (groups * accumulated), 'sequence')} x {training.length},"
            f" {flops:.2e} FLOP",
            f"training    {counted(training.steps, 'step')}, {tokens * training.steps:,} tokens,"
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
