"""Checkpoints that are whole or absent, and that execute no code when read."""

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.optim import Optimizer

from dape.errors import UserError
from dape.files import (
    check_ordinary,
    partial_of,
    read_json,
    remove,
    remove_leftovers,
    whole,
    write_json,
)
from dape.runs import RunFolder

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_PROGRESS = "progress.json"
_DESCRIPTION = {  # the types in the metadata of a checkpoint, beside dtypes
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        "_MEM_FORMAT_ENCODING",
    ),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # Python 3.13
}


@dataclass(slots=True)
class Progress:
    """The progress of a run: number of updates, and their wall time in seconds."""

    step: int = 0
    seconds: float = 0.0


def save(
    fabric: "Fabric",
    run: RunFolder,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Progress,
    keep: int,
) -> None:
    """Write a checkpoint, every rank its own shards, and drop all but the `keep` newest.

    Frozen parameters are left out, because the pretrained model has them. Settings of the optimizer
    are left out, because the recipe has them.
    """
    path = run.checkpoint(progress.step)
    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    state = {"model": weights, "optimizer": {"state": moments["state"]}}
    with whole(path) if fabric.is_global_zero else nullcontext():
        fabric.barrier()
        _write(state, partial_of(path))
        if fabric.is_global_zero:
            write_json(partial_of(path) / _PROGRESS, asdict(progress))
    if fabric.is_global_zero:
        prune(run, keep)
    fabric.barrier()


def _write(state: dict[str, Any], folder: Path) -> None:
    """Write this rank's shards of a checkpoint; raise the error of any rank."""
    try:
        with _alone_or_not():
            save_shards(state, checkpoint_id=folder)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def prune(run: RunFolder, keep: int) -> None:
    """Drop all checkpoints but the `keep` newest, and leftovers of an interrupted save."""
    for old in run.saved_checkpoints()[keep:]:
        remove(old)
    remove_leftovers(run.checkpoints)


def newest(
    saved: list[Path], read: Callable[[Path], Progress], say: Callable[[str], object]
) -> Progress | None:
    """Return `read(checkpoint)` for the newest readable checkpoint; None without checkpoints.

    Raises:
        UserError: if all checkpoints are unreadable.
    """
    for path in saved:
        try:
            return read(path)
        except UserError as error:
            say(f"{error}; trying the checkpoint before")
    if saved:
        raise UserError(
            f"no checkpoint in {saved[0].parent} is readable; delete that folder to start the run"
            " again"
        )
    return None


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> Progress:
    """Load weights and moments of a checkpoint, over any number of ranks.

    Raises:
        UserError: for a damaged checkpoint, or a checkpoint of another model.
    """
    # Not strict, because frozen parameters are in no checkpoint. The load covers all others.
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    weights, moments = get_state_dict(model, optimizer, options=options)
    progress = _fill({"model": weights, "optimizer": {"state": moments["state"]}}, path)
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options
    )
    return progress


def load_weights(path: Path, model: nn.Module) -> Progress:
    """Load the weights of a checkpoint into a model that is not trained further.

    Raises:
        UserError: for a damaged checkpoint, or a checkpoint of another model.
    """
    weights = get_model_state_dict(model)
    progress = _fill({"model": weights}, path)
    set_model_state_dict(model, weights)
    return progress


def _progress(path: Path) -> Progress:
    progress = read_json(
        path / _PROGRESS,
        lambda found: Progress(step=int(found["step"]), seconds=float(found["seconds"])),
        "the checkpoint is damaged",
    )
    if path.name != RunFolder(path.parent).checkpoint(progress.step).name:
        raise UserError(f"{path} holds the state of step {progress.step}")
    return progress


def _fill(tensors: dict[str, Any], path: Path) -> Progress:
    """Fill the tensors of a nested dictionary in place from a checkpoint; return the progress.

    Raises:
        UserError: on all ranks, for a checkpoint that a rank cannot read.
    """
    reader = _Reader(path)
    try:
        with _alone_or_not():
            load_shards(tensors, storage_reader=reader, planner=_Planner())
    except CheckpointException as error:
        reason = _in_words(next(iter(error.failures.values()))[0])
        raise UserError(f"{path} cannot be read ({reason})") from None
    return reader.progress


def _in_words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Reader(FileSystemReader):
    """PyTorch's reader of a checkpoint, with restrictions on the pickled metadata.

    A fault is kept until PyTorch collects the faults of all ranks. On unreadable metadata PyTorch
    would print tracebacks and look for further metadata.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.progress, self._metadata, self._fault = Progress(), Metadata({}), ""
        try:
            check_ordinary(*path.iterdir())
            self.progress = _progress(path)
            with (path / ".metadata").open("rb") as file:
                metadata = _Unpickler(file).load()
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
            self._metadata = metadata
        except Exception as error:  # a damaged pickle raises anything
            self._fault = _in_words(error)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        if self._fault:
            raise UserError(self._fault)
        super().set_up_storage_reader(metadata, *args, **kwargs)


class _Planner(DefaultLoadPlanner):
    """PyTorch's plan of a load, for tensors alone, because other entries are pickled objects."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor")


class _Unpickler(pickle.Unpickler):
    """Unpickles the types that describe a checkpoint, and refuses any other type."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _DESCRIPTION.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")


@contextmanager
def _alone_or_not() -> Iterator[None]:
    """Silence PyTorch's warning about a checkpoint of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
