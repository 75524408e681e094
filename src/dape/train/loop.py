"""The training loop: updates, metrics, validation, checkpoints."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from dape.errors import UserError
from dape.train import checkpoint, graphs
from dape.train.checkpoint import Progress
from dape.train.estimate import peak_flops
from dape.train.optimize import learning_rate
from dape.train.recipe import Settings
from dape.train.sharding import gather_once
from dape.train.task import Batch, Task
from dape.train.track import Metrics, Reporter

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True, slots=True)
class Session:
    """The objects of a run; `loss` is the module that computes the loss on the devices."""

    task: Task
    fabric: "Fabric"
    model: nn.Module
    loss: nn.Module
    optimizer: Optimizer
    progress: Progress

    @property
    def recipe(self) -> Settings:
        """Return the recipe."""
        return self.task.recipe

    def batch(self, split: str, step: int) -> Batch:
        """Return this rank's examples of batch `step` = 0, 1, ... of a split."""
        context = self.recipe.hardware.context_parallel
        group, groups = (n // context for n in (self.fabric.global_rank, self.fabric.world_size))
        return self.task.batch(split, step, group, groups)


def fit(session: Session) -> None:
    """Make the remaining updates; validate, log and save on the way.

    A run without updates is validated once.
    """
    recipe, fabric, progress = session.recipe, session.fabric, session.progress
    steps, every = recipe.training.steps, recipe.tracking
    begun = time.perf_counter() - progress.seconds
    with _reporter(session) as reporter:
        if steps == 0:
            found = {**reached(session, 0), "validation_loss": validate(session)}
            found["seconds"] = time.perf_counter() - begun
            if reporter:
                reporter.only(found)
        for metrics in updates(session):
            progress.step += 1
            last = progress.step == steps
            if last or progress.step % every.validate_every == 0:
                metrics["validation_loss"] = validate(session)
            progress.seconds = metrics["seconds"] = time.perf_counter() - begun
            if reporter:
                due = progress.step % every.log_every == 0 or "validation_loss" in metrics
                reporter.step(metrics, due)
            if last or progress.step % every.checkpoint_every == 0:
                checkpoint.save(
                    fabric,
                    recipe.run,
                    session.model,
                    session.optimizer,
                    progress,
                    every.keep_checkpoints,
                )


def updates(session: Session) -> Iterator[Metrics]:
    """Make the updates in turn and yield the metrics of each update.

    The host waits for the device once in an update, after it has started the whole update and the
    copy of the next batch. A loss or gradient norm that is not finite ends the updates.

    Raises:
        UserError: for a loss or gradient norm that is not finite.
    """
    recipe, fabric, optimizer = session.recipe, session.fabric, session.optimizer
    steps = recipe.training.steps
    parts = micro_batches(session, session.batch("train", session.progress.step))
    recording = record(session, parts)
    before = math.nan
    for step in range(session.progress.step + 1, steps + 1):
        begun = time.perf_counter()
        state = np.random.SeedSequence([recipe.seed, step, fabric.global_rank])
        torch.manual_seed(int(state.generate_state(1, np.uint64)[0]))
        mean = recording.accumulate(parts) if recording else accumulate(session, parts)
        limit = recipe.optimizer.clip_norm or math.inf
        norm = fabric.clip_gradients(
            session.loss, optimizer, max_norm=limit, error_if_nonfinite=False
        )
        rate = learning_rate(step, steps, recipe.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=recording is None)
        parts = micro_batches(session, session.batch("train", step))
        metrics: Metrics = {
            **reached(session, step),
            "loss": float(mean),
            "learning_rate": rate,
            "grad_norm": float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm),
        }
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise divergence(session.task, metrics, before)
        before = metrics["loss"]
        metrics["update_seconds"] = time.perf_counter() - begun
        yield metrics


def reached(session: Session, step: int) -> Metrics:
    """Return a step and the tokens up to the step, without tokens if steps differ."""
    tokens = session.task.tokens
    return {"step": step} if tokens is None else {"step": step, "tokens": step * tokens}


def record(session: Session, parts: list[Batch]) -> graphs.Recording | None:
    """Return the passes of a batch as a CUDA graph, None if recipe or device excludes graphs.

    A scheme whose passes cannot be recorded trains without a graph, with a warning.
    """
    fabric = session.fabric
    if session.recipe.hardware.compile != "graphs" or fabric.device.type != "cuda":
        return None
    try:
        return graphs.Recording(fabric, session.loss, parts[0], len(parts))
    except graphs.Unrecordable as reason:
        fabric.print(f"{session.recipe.run}: trains without CUDA graphs: {reason}")
        session.optimizer.zero_grad()
        return None


def accumulate(session: Session, parts: list[Batch]) -> Float[Tensor, ""]:
    """Add the gradient of the mean loss over all ranks' micro-batches, and return the loss.

    DDP exchanges gradients at the last micro-batch. `hardware.gather` decides for FSDP.
    """
    fabric = session.fabric
    total = torch.zeros((), device=fabric.device)
    for number, part in enumerate(parts, start=1):
        with exchange(session, last=number == len(parts)):
            loss = session.loss(*part) / len(parts)
            fabric.backward(loss)
        total += loss.detach()
    mean: Tensor = fabric.all_reduce(total, reduce_op="mean")
    return mean


def exchange(session: Session, last: bool) -> AbstractContextManager[Any]:
    """Return the context of a micro-batch's passes, which decides on the exchange of gradients."""
    hardware = session.recipe.hardware
    if hardware.strategy == "ddp":
        return session.fabric.no_backward_sync(session.loss, enabled=not last)
    if hardware.gather == "step":
        gather_once(session.loss, last)
    return nullcontext()


@torch.no_grad()
def validate(session: Session) -> float:
    """Return the mean loss of the first validation batches, which are equal at every call."""
    fabric, batches = session.fabric, session.recipe.tracking.validation_batches
    session.loss.eval()
    total = torch.zeros((), device=fabric.device)
    for step in range(batches):
        parts = micro_batches(session, session.batch("validation", step))
        for part in parts:
            total += session.loss(*part) / len(parts)
    session.loss.train()
    mean = fabric.all_reduce(total, reduce_op="mean")
    return float(mean) / batches


def micro_batches(session: Session, batch: Batch) -> list[Batch]:
    """Return a rank's batch on the device, in equal micro-batches.

    The copy does not wait for running computations of the device.
    """
    device = session.fabric.device
    if device.type == "cuda":
        batch = tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)
    rows = session.recipe.hardware.micro_batch_size or len(batch[0])
    return list(zip(*(tensor.split(rows) for tensor in batch), strict=True))


def divergence(task: Task, metrics: Metrics, before: float) -> UserError:
    """Return the error for a loss or gradient that is not finite, with place and remedies."""
    step = int(metrics["step"])
    return UserError(
        f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, at learning"
        f" rate {metrics['learning_rate']:.2e}; the previous loss was {before:.4f}. The batch was"
        f" {task.origin(step - 1)}. No checkpoint in {task.recipe.run} has this update. Try, under"
        " another --name, a lower optimizer.learning_rate, a longer optimizer.warmup or"
        " training.precision=fp32"
    )


def _reporter(session: Session) -> "Reporter | nullcontext[None]":
    """Return the progress report of the run, which the first rank alone prints."""
    if not session.fabric.is_global_zero:
        return nullcontext()
    flops, peak = session.task.flops(session.model), peak_flops(session.fabric.device)
    ceiling = peak * session.fabric.world_size / flops if peak and flops else None
    return Reporter(session.recipe, session.progress.step, session.task.tokens, ceiling)
