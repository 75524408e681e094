"""Fine-tuning of a pretrained model: its adapters, and parts of it, by the loop of `dape train`."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dape.errors import UserError, unknown
from dape.train.config import Optimizer, Options, Recipe, Tracking, Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dape.data.shards import Corpus
    from dape.model.retrofit import Mounted
    from dape.train.loop import Session

ADAPTERS = "adapters"  # what trains by default, and the folder of a run that holds them


@dataclass(frozen=True, slots=True)
class Base:
    """The pretrained model, what is mounted in it, and what of it trains."""

    base: Annotated[str, tyro.conf.Suppress] = ""
    """folder or hub name of the model: the first argument of the command"""
    adapter: str | None = "dape"
    """mounted in each attention: dape, dape3, talking-heads, ... (None: the model as it is)"""
    bias: str | None = "kerple"
    """what the adapter sees beside the scores: kerple, alibi, fire, ...; None for scores alone, and
    for models that have ALiBi themselves"""
    options: Options = field(default_factory=dict)
    """options of both, such as {adapter: {hidden: 64}}"""
    train: str = ADAPTERS
    """what trains, commas between: adapters, components of parameter names (o_proj), or all"""
    config: Options = field(default_factory=dict)
    """keys of the model's configuration to change, such as {scheme: yarn}"""
    backend: str = "auto"
    """how attention is computed; `dape info` says which backends work here"""

    @property
    def scheme(self) -> str:
        """Return what is mounted, as one word."""
        return "-".join(filter(None, (self.adapter, self.bias))) if self.adapter else "plain"


@dataclass(frozen=True, slots=True)
class Retrofit(Recipe):
    """Everything that a fine-tuning run depends on; its length is the one to learn to read."""

    name: str = "retrofit-{scheme}"
    """of the run; {scheme} (adapter-bias) and {seed} are filled in"""
    model: Base = field(default_factory=Base)  # type: ignore[assignment]
    """the pretrained model, what is mounted in it, and what of it trains"""
    training: Training = field(
        default_factory=lambda: Training(length=2048, batch_size=32, steps=1000)
    )
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(learning_rate=1e-2, warmup=0.05, weight_decay=0.0)
    )
    tracking: Tracking = field(
        default_factory=lambda: Tracking(validate_every=100, checkpoint_every=250)
    )


def check(recipe: Retrofit) -> None:
    """Raise a `UserError` for a recipe that this machine cannot run, before anything is loaded."""
    from dape.attention.select import select
    from dape.train import parallelize, track

    select(recipe.model.backend)
    recipe.micro_batches(parallelize.ranks())
    parallelize.device(recipe.hardware)
    track.check(recipe)
    if parallelize.ranks() > 1 and recipe.hardware.strategy == "fsdp":
        raise UserError(
            "hardware.strategy='fsdp': adapters are not sharded; several devices take ddp, with "
            "hardware.activation_checkpointing if memory is short"
        )
    if recipe.hardware.compile:
        raise UserError(
            "hardware.compile=true: the blocks of pretrained models have no common name; leave it"
        )


def load(recipe: Retrofit) -> "PreTrainedModel":
    """Return the pretrained model in float32, with the configuration's keys that are to change.

    Raises:
        UserError: if there is no such model, or it has no such key.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dape.data.hub import fetch

    base, changes = recipe.model.base, recipe.model.config
    if (Path(base) / "model" / "config.json").is_file():
        base = str(Path(base) / "model")  # of a run
    read = partial(AutoConfig.from_pretrained, return_unused_kwargs=True)
    config, unused = fetch(read, base, **changes)
    for name in unused.keys() & changes.keys():
        raise unknown(f"key of the configuration of {base}", name, config.to_dict())
    return fetch(AutoModelForCausalLM.from_pretrained, base, config=config, dtype=torch.float32)


def prepare(recipe: Retrofit, model: "PreTrainedModel") -> "Mounted | None":
    """Mount what the recipe says, if anything, and let what it names train."""
    from dape.model.retrofit import retrofit, set_trainable

    chosen, train = recipe.model, recipe.model.train.split(",")
    if chosen.adapter is None:
        set_trainable(model, train)
        return None
    return retrofit(
        model,
        chosen.adapter,
        chosen.bias,
        options=chosen.options,
        train=train,
        backend=chosen.backend,
    )


def finetune(recipe: Retrofit, corpus: "Corpus") -> None:
    """Train until the last step, from the latest checkpoint if there is one, and save.

    What is saved is `adapters/` in the folder of the run, or `model/` where none are mounted.

    Raises:
        UserError: for a model that cannot be served, and as `dape.train.loop.train`.
    """
    import torch

    from dape.train.loop import begin, complete, export
    from dape.train.parallelize import launch

    fabric = launch(recipe)
    torch.manual_seed(recipe.seed)
    model = load(recipe).to(fabric.device)
    mounted = prepare(recipe, model)
    session = begin(recipe, corpus, fabric, model)
    complete(session, export if mounted is None else partial(save_adapters, mounted))


def save_adapters(mounted: "Mounted", session: "Session") -> None:
    """Write the adapters into the folder of the run."""
    if session.fabric.is_global_zero:
        mounted.save(session.recipe.folder / ADAPTERS)
    session.fabric.barrier()
