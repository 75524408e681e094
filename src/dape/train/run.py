"""From a recipe to a finished run: `train` and `finetune`, and `follow` for any task."""

from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from dape.data.shards import Corpus
from dape.errors import RankError, UserError
from dape.files import is_free, locked, remove_leftovers, tidy, write_text
from dape.provenance import device_name, provenance
from dape.ranks import check_same, is_first_rank, rank, ranks
from dape.runs import RunFolder
from dape.train import checkpoint, parallelize
from dape.train.checkpoint import Progress
from dape.train.faults import explained, wait_for
from dape.train.loop import Session, fit
from dape.train.optimize import adamw
from dape.train.plan import check, check_memory
from dape.train.recipe import Recipe, Retrofit, Settings, differences, override, read, write
from dape.train.task import LanguageModelling, Retrofitting, Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric

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


def follow(task: Task) -> RunFolder:
    """Train a task to the last step of the recipe, save the result, and record the end.

    Raises:
        UserError: as `train`.
    """
    run, first = task.recipe.run, is_first_rank()
    check_folder(task.recipe, task.data)
    finished = run.finished
    if finished and first:
        tidy(run.path)
    if finished and ranks() == 1:
        return run
    busy = f"another process is training in {run}; wait for the end, or give another --name"
    lock = locked(run.path, busy) if first and not finished else nullcontext()
    with lock, explained(run, task.recipe.hardware, rank(), ranks()):
        if first:
            check_folder(task.recipe, task.data)  # another process may have trained meanwhile
        fabric = parallelize.launch(task.recipe)
        if fabric.broadcast(run.finished):  # the first process decides for all
            return run
        session = begin(task, fabric)
        fit(session)
        task.save(fabric, session.model)
        if first:
            # A kill after the last step may have left older checkpoints.
            checkpoint.prune(run, task.recipe.tracking.keep_checkpoints)
            run.update_record({**run.read_metrics()[-1], "ended": _now()})
        fabric.barrier()  # a script on all ranks may read the record next
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


def begin(task: Task, fabric: "Fabric") -> Session:
    """Return the session of a task, from the newest checkpoint if any."""
    recipe, run = task.recipe, task.recipe.run
    session = lay_out(task, fabric)
    model = session.model
    if fabric.is_global_zero:
        facts = {"ranks": fabric.world_size, **task.facts(model)}
        _note_start(task, provenance(fabric.device) | facts)
    # A slow file system may show this process less than the first process.
    saved, first, data = fabric.broadcast((run.saved_checkpoints(), recipe, task.data))
    if changed := differences(first, recipe):
        raise RankError(
            f"rank {rank()} of {ranks()}: other settings than those of the first process:"
            f" {', '.join(changed)}; give all processes the same recipe and options"
        )
    if task.data and data:
        check_same(task.data["path"], task.data["checksum"], data["checksum"])
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


def lay_out(task: Task, fabric: "Fabric") -> Session:
    """Return the session of a task at the first step, with the model on all devices."""
    torch.manual_seed(task.recipe.seed)
    model, drawn = parallelize.start(fabric, task)
    task.context_parallel = parallelize.context_parallel(fabric, task.recipe.hardware)
    loss = parallelize.parallelize(fabric, model, task, drawn)
    loss.train()  # a pretrained model comes without dropout, as for inference
    return Session(task, fabric, model, loss, adamw(model, task.recipe.optimizer), Progress())


def _note_start(task: Task, facts: dict[str, Any]) -> None:
    """Write the recipe and the record of an unfinished run."""
    run = task.recipe.run
    remove_leftovers(run.path)
    write_text(run.recipe, write(task.recipe))
    run.update_record(
        {
            **facts,
            "seed": task.recipe.seed,
            "data": task.data,
            "started": run.read_record().get("started", _now()),
            "ended": None,
        }
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
