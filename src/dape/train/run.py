"""From a recipe to a finished run: `train` and `finetune`, and `follow` for any objective."""

from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from os import PathLike
from typing import Any

import torch

from dape.data.shards import Corpus
from dape.errors import UserError
from dape.files import is_free, locked, remove_leftovers, tidy, write_text
from dape.provenance import device_name, provenance
from dape.runs import RunFolder
from dape.train import checkpoint, parallelize
from dape.train.checkpoint import Progress
from dape.train.faults import explained, wait_for
from dape.train.loop import Session, fit
from dape.train.objective import LanguageModelling, Objective, Retrofitting
from dape.train.optimize import adamw
from dape.train.plan import check, check_memory
from dape.train.recipe import Recipe, Retrofit, Settings, differences, override, read, write

Source = str | PathLike[str]


def train(
    recipe: Source | Recipe, *, scheme: str | None = None, seed: int | None = None, **overrides: Any
) -> RunFolder:
    """Train a language model by a recipe, and return the run folder.

    A finished run returns at once. An interrupted run resumes from the latest checkpoint.

    Args:
        recipe: a recipe or a YAML file.
        scheme: the scheme, short for `model={"scheme": scheme}`.
        seed: seed of the weights and of the order of the data.
        overrides: further keys of the recipe; a section takes a mapping of changed keys, and
            `**{"training.steps": 10}` equals `training={"steps": 10}`.

    Returns:
        The run folder, with recipe, record, metrics, checkpoints and model.

    Raises:
        UserError: for a recipe that cannot run on this machine, a folder with another run, a loss
            that is no longer finite, or too little memory.
    """
    given = {"model.scheme": scheme, "seed": seed}
    chosen = override(
        recipe if isinstance(recipe, Recipe) else read(recipe, Recipe),
        overrides | {key: value for key, value in given.items() if value is not None},
    )
    check(chosen)
    check_memory(chosen)
    return follow(LanguageModelling(chosen, Corpus(chosen.data)))


def finetune(
    base: Source,
    recipe: Source | Retrofit | None = None,
    *,
    seed: int | None = None,
    **overrides: Any,
) -> RunFolder:
    """Train adapters in a pretrained model, or parts of the model, and return the run folder.

    Args:
        base: the pretrained model, as a folder, a run folder or a name on the hub.
        recipe: a recipe or a YAML file; the defaults of `Retrofit` without a recipe.
        seed: seed of the adapters and of the order of the data.
        overrides: further keys, as in `train`.

    Returns:
        The run folder, with adapters in place of a model.

    Raises:
        UserError: for an unsupported model, and as `train`.
    """
    if not isinstance(recipe, Retrofit):
        recipe = Retrofit() if recipe is None else read(recipe, Retrofit)
    given = {"model.base": base} | ({} if seed is None else {"seed": seed})
    chosen = override(recipe, overrides | given)
    check(chosen)
    check_memory(chosen)
    return follow(Retrofitting(chosen, Corpus(chosen.data)))


def follow(objective: Objective) -> RunFolder:
    """Train an objective to the last step of the recipe, save the result, and record the end.

    Raises:
        UserError: as `train`.
    """
    run = objective.recipe.run
    check_folder(objective.recipe, objective.data)
    if run.finished:
        if parallelize.is_first_rank():
            tidy(run.path)
        return run
    busy = f"another process is training in {run}; wait for the end, or give another --name"
    with locked(run.path, busy) if parallelize.is_first_rank() else nullcontext():
        session = begin(objective)
        fabric = session.fabric
        with explained(run, objective.recipe.hardware, fabric.global_rank, fabric.world_size):
            fit(session)
            objective.save(fabric, session.model)
        if fabric.is_global_zero:
            # A kill after the last step may have left older checkpoints.
            checkpoint.prune(run, objective.recipe.tracking.keep_checkpoints)
            run.update_record({**run.read_metrics()[-1], "ended": _now()})
    return run


def check_folder(recipe: Settings, data: dict[str, str] | None) -> None:
    """Refuse a run folder of another recipe or other data.

    Raises:
        UserError: for a folder of another recipe or other data, or without a run.
    """
    run, remedy = recipe.run, "give another --name or --out, or delete that folder"
    if is_free(run.path):
        return
    if not run.exists:
        raise UserError(f"{run} exists and is not a run; {remedy}")
    changed = differences(read(run.recipe, type(recipe)), recipe)
    if changed:
        raise UserError(f"{run} holds a run with other settings: {', '.join(changed)}; {remedy}")
    found = run.read_record().get("data")
    if data and found and found["checksum"] != data["checksum"]:
        raise UserError(
            f"{run} holds a run on other data: {data['path']} has checksum"
            f" {data['checksum'][:12]} (was {found['checksum'][:12]}); {remedy}"
        )


def begin(objective: Objective) -> Session:
    """Return the session of an objective, from the newest checkpoint if any."""
    recipe, run = objective.recipe, objective.recipe.run
    session = lay_out(objective)
    fabric, model = session.fabric, session.model
    if fabric.is_global_zero:
        facts = {"ranks": fabric.world_size, **objective.facts(model)}
        _note_start(objective, provenance(fabric.device) | facts)
    # A slow file system may show this process less than the first process.
    saved = fabric.broadcast(run.saved_checkpoints())
    for path in (run.recipe, *saved):
        wait_for(path)
    load = partial(checkpoint.load, model=model, optimizer=session.optimizer)
    progress = checkpoint.newest(saved, load, fabric.print) or Progress()
    if progress.step > recipe.training.steps:
        raise UserError(
            f"{run} has a checkpoint of step {progress.step}, beyond training.steps="
            f"{recipe.training.steps}; delete the checkpoint"
        )
    sizes = [(each.numel(), each.requires_grad) for each in model.parameters()]
    fabric.print(
        f"{run}: {recipe.scheme}, {sum(size for size, trains in sizes if trains):,} of"
        f" {sum(size for size, _ in sizes):,} parameters train, on"
        f" {fabric.world_size} x {device_name(fabric.device)}, from step {progress.step}"
    )
    return replace(session, progress=progress)


def lay_out(objective: Objective) -> Session:
    """Return the session of an objective at the first step, with the model on all devices."""
    fabric = parallelize.launch(objective.recipe)
    torch.manual_seed(objective.recipe.seed)
    model, drawn = parallelize.start(fabric, objective)
    objective.context_parallel = parallelize.context_parallel(fabric, objective.recipe.hardware)
    loss = parallelize.parallelize(fabric, model, objective, drawn)
    return Session(
        objective, fabric, model, loss, adamw(model, objective.recipe.optimizer), Progress()
    )


def _note_start(objective: Objective, facts: dict[str, Any]) -> None:
    """Write the recipe and the record of an unfinished run."""
    run = objective.recipe.run
    remove_leftovers(run.path)
    write_text(run.recipe, write(objective.recipe))
    run.update_record(
        {
            **facts,
            "seed": objective.recipe.seed,
            "data": objective.data,
            "started": run.read_record().get("started", _now()),
            "ended": None,
        }
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
