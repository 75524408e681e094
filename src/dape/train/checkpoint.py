"""Checkpoints that are whole or absent: a distributed folder, renamed once it is complete."""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.fabric import Fabric

PARTIAL = ".partial"


@dataclass(slots=True)
class Progress:
    """How far a run has come: updates made, and seconds of wall time spent on them."""

    step: int = 0
    seconds: float = 0.0


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, found by looking."""
    found = sorted(folder.glob("step-" + "[0-9]" * 8))
    return found[-1] if found else None


def save(
    fabric: "Fabric",
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Progress,
    keep: int,
) -> None:
    """Write `step-NNNNNNNN` into `folder`, each rank its own shards, and drop all but `keep`.

    Frozen parameters are left out: they are where they came from.
    A process that dies meanwhile leaves a `.partial` folder, which is not looked at and removed by
    the next call.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    path = folder / f"step-{progress.step:08d}"
    partial = path.with_suffix(PARTIAL)
    if fabric.is_global_zero:
        for leftover in folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
    fabric.barrier()
    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    with _alone_or_not():
        save_shards({"model": weights, "optimizer": moments}, checkpoint_id=partial)
    if fabric.is_global_zero:
        (partial / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        partial.rename(path)
        for old in sorted(folder.glob("step-" + "[0-9]" * 8))[:-keep]:
            shutil.rmtree(old.rename(old.with_suffix(PARTIAL)))
    fabric.barrier()


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> Progress:
    """Put a checkpoint's weights and moments in place, over any number of ranks."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    # Not strict: what is frozen is in no checkpoint. What is not, the model itself has asked for.
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    weights, moments = get_state_dict(model, optimizer, options=options)
    with _alone_or_not():  # fills the tensors of both in place
        load_shards({"model": weights, "optimizer": moments}, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options
    )
    return _progress(path)


def load_weights(path: Path, model: nn.Module) -> Progress:
    """Put a checkpoint's weights in place, in a model that is not to be trained on."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    weights = get_model_state_dict(model)
    with _alone_or_not():
        load_shards({"model": weights}, checkpoint_id=path)
    set_model_state_dict(model, weights)
    return _progress(path)


def _progress(path: Path) -> Progress:
    return Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))


@contextmanager
def _alone_or_not() -> Iterator[None]:
    """Silence the remark that a single process writes a checkpoint of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
