"""The training run: set up, fit, export."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from dape.data.shards import Corpus, Windows
from dape.errors import UserError
from dape.provenance import device_name, provenance
from dape.train import checkpoint, folder, parallelize
from dape.train.checkpoint import Progress
from dape.train.config import Recipe
from dape.train.estimate import flops_per_token, peak_flops, size
from dape.train.optimize import adamw, learning_rate
from dape.train.track import Metrics, Reporter, last_metrics

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True, slots=True)
class Session:
    """What a run works with; `loss` is `model` as the devices compute it, tokens to mean loss."""

    recipe: Recipe
    corpus: Corpus
    fabric: "Fabric"
    model: nn.Module
    loss: nn.Module
    optimizer: Optimizer
    progress: Progress

    def windows(self, split: str, seed: int) -> Windows:
        """Return the windows of a split at the training length."""
        return Windows(self.corpus.split(split), self.recipe.training.length, seed)


def build(recipe: Recipe, vocab_size: int, end_of_text: int | None = None) -> nn.Module:
    """Return the model of a recipe, on the default device, drawn from its default generator.

    Raises:
        UserError: for a scheme, an option or a backend that the model refuses.
    """
    from dape.model.configuration import DapeConfig
    from dape.model.modeling import DapeForCausalLM

    settings = asdict(recipe.model)
    settings |= {"vocab_size": vocab_size, "train_length": recipe.training.length}
    model: nn.Module = DapeForCausalLM(DapeConfig(**settings, eos_token_id=end_of_text))
    return model


def train(recipe: Recipe, corpus: Corpus) -> None:
    """Train until the last step, from the latest checkpoint if there is one, and export the model.

    Raises:
        UserError: if the loss or its gradient is no longer finite, or memory does not suffice.
    """
    complete(setup(recipe, corpus), export)


def complete(session: Session, save: Callable[[Session], None]) -> None:
    """Make the updates that are left, save what was learned, and note the end."""
    recipe = session.recipe
    try:
        fit(session)
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory on {session.fabric.device}: lower hardware.micro_batch_size (now"
            f" {recipe.hardware.micro_batch_size or 'the whole batch'}), turn on"
            " hardware.activation_checkpointing, or shard with hardware.strategy=fsdp"
        ) from None
    save(session)
    if session.fabric.is_global_zero:
        folder.write(recipe, {**last_metrics(recipe.folder), "ended": _now()})


def setup(recipe: Recipe, corpus: Corpus) -> Session:
    """Return the session of a model that the recipe's seed draws.

    Every rank draws the whole model on its device, so that the weights are the same for any number
    of ranks, and then keeps its part.
    """
    fabric = parallelize.launch(recipe)
    torch.manual_seed(recipe.seed)
    with fabric.device:
        model = build(recipe, recipe.model.vocab_size or corpus.vocab_size, corpus.end_of_text)
    return begin(recipe, corpus, fabric, model)


def begin(recipe: Recipe, corpus: Corpus, fabric: "Fabric", model: nn.Module) -> Session:
    """Return the session of a model, with its optimizer, as the run left them if it did."""
    numbers = size(model)
    loss = parallelize.parallelize(fabric, model, recipe.hardware)
    optimizer = adamw(model, recipe.optimizer)
    if fabric.is_global_zero:
        entries = {
            **provenance(fabric.device),
            "ranks": fabric.world_size,
            "seed": recipe.seed,
            "data": {"path": recipe.data, "checksum": corpus.checksum},
            "scheme": recipe.model.scheme,
            "train_length": recipe.training.length,
            "parameters": numbers.parameters,
            "position_parameters": numbers.positional,
            "started": folder.record(recipe.folder).get("started", _now()),
            "ended": None,
        }
        folder.write(recipe, entries)
    fabric.barrier()
    saved = checkpoint.latest(recipe.folder / "checkpoints")
    progress = checkpoint.load(saved, model, optimizer) if saved else Progress()
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    fabric.print(
        f"{recipe.folder}: {recipe.model.scheme}, {trained:,} of {numbers.parameters:,} parameters"
        f" train, on {fabric.world_size} x {device_name(fabric.device)}, from step {progress.step}"
    )
    return Session(recipe, corpus, fabric, model, loss, optimizer, progress)


def fit(session: Session) -> None:
    """Make the updates that are left; validate, log and save on the way."""
    recipe, fabric, progress = session.recipe, session.fabric, session.progress
    steps, every = recipe.training.steps, recipe.tracking
    validation = session.windows("validation", seed=0)
    begun = time.perf_counter() - progress.seconds
    with _reporter(session) as reporter:
        for metrics in updates(session):
            progress.step += 1
            last = progress.step == steps
            if last or progress.step % every.validate_every == 0:
                metrics["validation_loss"] = validate(session, validation)
            progress.seconds = metrics["seconds"] = time.perf_counter() - begun
            if reporter:
                due = progress.step % every.log_every == 0 or "validation_loss" in metrics
                reporter.step(metrics, due)
            if last or progress.step % every.checkpoint_every == 0:
                checkpoint.save(
                    fabric,
                    recipe.folder / "checkpoints",
                    session.model,
                    session.optimizer,
                    progress,
                    every.keep_checkpoints,
                )


def updates(session: Session) -> Iterator[Metrics]:
    """Make the updates one by one and yield what was measured at each.

    The tokens of the next are read while the device computes. Nothing changes unless the loss and
    the norm of its gradient are finite.

    Raises:
        UserError: if they are not.
    """
    recipe, fabric, optimizer = session.recipe, session.fabric, session.optimizer
    windows, steps = session.windows("train", recipe.seed), recipe.training.steps
    tokens = share(session, windows, session.progress.step)
    before = math.nan
    for step in range(session.progress.step + 1, steps + 1):
        begun = time.perf_counter()
        state = np.random.SeedSequence([recipe.seed, step, fabric.global_rank])
        torch.manual_seed(int(state.generate_state(1, np.uint64)[0]))
        mean = accumulate(session, tokens)
        limit = recipe.optimizer.clip_norm or math.inf
        norm = fabric.clip_gradients(
            session.loss, optimizer, max_norm=limit, error_if_nonfinite=False
        )
        tokens = share(session, windows, step)
        metrics = {
            "step": step,
            "tokens": step * recipe.training.batch_size * recipe.training.length,
            "loss": float(mean),
            "learning_rate": learning_rate(step, steps, recipe.optimizer),
            "grad_norm": float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm),
        }
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise divergence(recipe, metrics, before)
        before = metrics["loss"]
        for group in optimizer.param_groups:
            group["lr"] = metrics["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
        metrics["update_seconds"] = time.perf_counter() - begun
        yield metrics


def share(session: Session, windows: Windows, step: int) -> Int[Tensor, "rows window"]:
    """Return this rank's rows of batch `step` = 0, 1, ..., which is windows step * B and on."""
    batch, fabric = session.recipe.training.batch_size, session.fabric
    rows = batch // fabric.world_size
    first = step * batch + fabric.global_rank * rows
    return torch.from_numpy(np.stack([windows[n] for n in range(first, first + rows)]))


def accumulate(session: Session, tokens: Int[Tensor, "rows window"]) -> Float[Tensor, ""]:
    """Add the gradient of the mean loss over all ranks' tokens, and return that loss.

    DDP exchanges gradients at the last micro-batch; FSDP at each, to keep no whole gradient.
    """
    fabric, hardware = session.fabric, session.recipe.hardware
    parts = tokens.split(hardware.micro_batch_size or len(tokens))
    total = torch.zeros((), device=fabric.device)
    for number, part in enumerate(parts, start=1):
        wait = number < len(parts) and hardware.strategy == "ddp"
        with fabric.no_backward_sync(session.loss, enabled=wait):
            loss = session.loss(part.to(fabric.device)) / len(parts)
            fabric.backward(loss)
        total += loss.detach()
    mean: Tensor = fabric.all_reduce(total, reduce_op="mean")
    return mean


@torch.no_grad()
def validate(session: Session, windows: Windows) -> float:
    """Return the mean loss of the first validation batches, the same at every call."""
    fabric, hardware = session.fabric, session.recipe.hardware
    session.loss.eval()
    total = torch.zeros((), device=fabric.device)
    for step in range(session.recipe.tracking.validation_batches):
        tokens = share(session, windows, step)
        for part in tokens.split(hardware.micro_batch_size or len(tokens)):
            total += session.loss(part.to(fabric.device)) * len(part) / len(tokens)
    session.loss.train()
    mean = fabric.all_reduce(total, reduce_op="mean")
    return float(mean) / session.recipe.tracking.validation_batches


def divergence(recipe: Recipe, metrics: Metrics, before: float) -> UserError:
    """Return the error for a loss or gradient that is not finite: what to look at, what to do."""
    step, batch = int(metrics["step"]), recipe.training.batch_size
    return UserError(
        f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, at learning"
        f" rate {metrics['learning_rate']:.2e}; the loss before was {before:.4f}. The batch was"
        f" windows {(step - 1) * batch} to {step * batch - 1} of split 'train' in {recipe.data}"
        f" (length {recipe.training.length}, seed {recipe.seed}). The update was not made and the"
        f" checkpoints in {recipe.folder} are untouched. Try, under another --name, a lower"
        " optimizer.learning_rate, a longer optimizer.warmup or training.precision=fp32"
    )


def export(session: Session) -> None:
    """Write `model/`: the whole model and its tokenizer as Hugging Face loads them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for the writing of one file
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(session.model, options=options)
    if session.fabric.is_global_zero:
        final = session.recipe.folder / "model"
        partial = final.with_name("model" + checkpoint.PARTIAL)
        for leftover in (final, partial):
            shutil.rmtree(leftover, ignore_errors=True)
        session.model.save_pretrained(partial, state_dict=weights)  # type: ignore[operator]
        session.corpus.tokenizer().save_pretrained(partial)
        partial.rename(final)
    session.fabric.barrier()


def _reporter(session: Session) -> "Reporter | nullcontext[None]":
    """Return who tells of the run: the first rank."""
    if not session.fabric.is_global_zero:
        return nullcontext()
    flops = flops_per_token(session.model, session.recipe.training.length)
    peak = peak_flops(session.fabric.device)
    ceiling = peak * session.fabric.world_size / flops if peak else None
    return Reporter(session.recipe, session.progress.step, ceiling)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
