import pickle
from io import BytesIO
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dape.errors import UserError
from dape.files import partial_of
from dape.runs import RunFolder
from dape.train import checkpoint
from dape.train.checkpoint import Progress
from dape.train.optimize import adamw
from dape.train.sections import Optimizer


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def trained(updates):
    """Return a layer and its optimizer, drawn anew, after some updates."""
    layer = nn.Linear(3, 4)
    optimizer = adamw(layer, Optimizer())
    for _ in range(updates):
        layer(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer, optimizer


def state(layer, optimizer):
    moments = [optimizer.state[p][key] for p in layer.parameters() for key in ("exp_avg", "step")]
    return [*layer.parameters(), *moments]


def test_weights_and_moments_return_bit_by_bit(tmp_path, fabric):
    layer, optimizer = trained(updates=3)
    checkpoint.save(fabric, RunFolder(tmp_path), layer, optimizer, Progress(3, 1.25), keep=1)
    other, fresh = trained(updates=0)
    progress = checkpoint.load(RunFolder(tmp_path).latest_checkpoint, other, fresh)
    assert progress == Progress(3, 1.25)
    for found, expected in zip(state(other, fresh), state(layer, optimizer), strict=True):
        assert torch.equal(found, expected)


def test_the_newest_are_kept(tmp_path, fabric):
    layer, optimizer = trained(updates=1)
    run = RunFolder(tmp_path)
    assert run.latest_checkpoint is None
    for step in (8, 9, 10, 11):
        checkpoint.save(fabric, run, layer, optimizer, Progress(step), keep=2)
    kept = sorted(path.name for path in run.checkpoints.iterdir())
    assert kept == ["step-00000010", "step-00000011"]
    assert run.latest_checkpoint.name == "step-00000011"


def test_what_an_interrupted_save_left_is_not_loaded_and_goes(tmp_path, fabric):
    layer, optimizer = trained(updates=1)
    run = RunFolder(tmp_path)
    checkpoint.save(fabric, run, layer, optimizer, Progress(1), keep=2)
    for name in ("step-00000002", "step-00000000"):
        left = partial_of(run.checkpoints / name)
        left.mkdir()
        (left / "__0_0.distcp").write_bytes(b"half")
    assert run.latest_checkpoint.name == "step-00000001"
    checkpoint.save(fabric, run, layer, optimizer, Progress(2), keep=2)
    kept = sorted(path.name for path in run.checkpoints.iterdir())
    assert kept == ["step-00000001", "step-00000002"]
    assert checkpoint.load(run.latest_checkpoint, *trained(updates=0)).step == 2


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.fixture
def saved(tmp_path, fabric):
    run = RunFolder(tmp_path / "run")
    checkpoint.save(fabric, run, *trained(updates=1), Progress(1), keep=1)
    return run.latest_checkpoint


def test_metadata_of_someone_else_runs_no_code(saved, tmp_path):
    (saved / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "canary")))
    for read in (
        lambda: checkpoint.load(saved, *trained(updates=0)),
        lambda: checkpoint.load_weights(saved, trained(updates=0)[0]),
    ):
        with pytest.raises(
            UserError, match=r"cannot be read \(pathlib[\w.]*.Path.touch is not allowed in"
        ):
            read()
    assert not (tmp_path / "canary").exists()
    pickle.loads((saved / ".metadata").read_bytes())
    assert (tmp_path / "canary").exists(), "or it was not hostile"


def test_an_object_in_the_place_of_a_tensor_runs_no_code(saved, tmp_path):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    hostile = BytesIO()
    torch.save(Hostile(tmp_path / "canary"), hostile)
    (saved / "__0_0.distcp").write_bytes(hostile.getvalue())
    for index, stored in metadata.storage_data.items():
        if index.fqn == "model.weight":
            stored.offset, stored.length = 0, len(hostile.getvalue())
    for kind in (metadata.state_dict_metadata["model.weight"], BytesStorageMetadata()):
        metadata.state_dict_metadata["model.weight"] = kind
        (saved / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(UserError, match="cannot be read"):
            checkpoint.load(saved, *trained(updates=0))
    assert not (tmp_path / "canary").exists()
