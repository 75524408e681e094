"""How one model is laid out over devices: everything that is distributed, outside the model."""

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dape.errors import UserError
from dape.train.recipe import Settings
from dape.train.sections import Hardware
from dape.train.task import Task

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch.distributed.device_mesh import DeviceMesh

PRECISION = {"bf16-mixed": "bf16-mixed", "fp32": "32-true"}


def ranks() -> int:
    """Return how many processes train together: those `torchrun` started, or this one alone."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_rank() -> bool:
    """Return whether this process speaks for all."""
    return int(os.environ.get("RANK", 0)) == 0


def device(hardware: Hardware) -> torch.device:
    """Return the kind of device to train on.

    Raises:
        UserError: if there are fewer GPUs than processes on this machine.
    """
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if hardware.device == "cpu" or (hardware.device == "auto" and not gpus):
        return torch.device("cpu")
    if not gpus:
        raise UserError("hardware.device='cuda': PyTorch sees no GPU; take --hardware.device cpu")
    if gpus < processes:
        raise UserError(
            f"hardware.device={hardware.device!r}: {processes} processes for {gpus} GPUs; start"
            f" {gpus} with `torchrun --nproc_per_node={gpus}`, or take --hardware.device cpu"
        )
    return torch.device("cuda")


def launch(recipe: Settings) -> "Fabric":
    """Return Lightning's Fabric, started: a single device, DDP, or FSDP2 by `shard`."""
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

    for chatty in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    strategy: Any = "auto"
    if ranks() > 1 and recipe.hardware.strategy == "ddp":
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # Fabric's doing
        strategy = DDPStrategy()
    elif ranks() > 1:
        strategy = ModelParallelStrategy(shard, data_parallel_size=ranks(), tensor_parallel_size=1)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fabric = Fabric(
        accelerator=device(recipe.hardware).type,
        devices=local,
        num_nodes=ranks() // local,
        strategy=strategy,
        precision=PRECISION[recipe.training.precision],
    )
    fabric.launch()
    return fabric


class Loss(nn.Module):
    """The loss of a task as a module of the model, so that calling it exchanges gradients."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self._task = task

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of the examples of a batch."""
        return self._task.loss(self.model, *batch)


def parallelize(fabric: "Fabric", model: nn.Module, task: Task) -> nn.Module:
    """Return the loss of `model` as the devices compute it: checkpoint, compile, shard or copy."""
    hardware = task.recipe.hardware
    if hardware.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    graphs = hardware.compile == "graphs" and fabric.device.type == "cuda"
    if graphs or hardware.compile == "blocks":
        # Float32 products stay exact, whatever the compiler advises.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.forward = torch.compile(layer.forward)
        # Uncompiled, logits in float32, their softmax and their gradient take a tenth of a step.
        model.loss_function = torch.compile(model.loss_function)  # type: ignore
    return fabric.setup_module(Loss(model, task))


def shard(loss: Loss, mesh: "DeviceMesh") -> Loss:
    """Shard each block, then the rest, over the data-parallel ranks (FSDP2).

    Weights travel in float32, and autocast alone decides the arithmetic, as on one device. A bias
    and an adapter belong to their block's group: attention reads their parameters many times, in
    blocks of rows or in a kernel, which a group of their own, opened and closed by each call of the
    module, would not survive.
    """
    from torch.distributed.fsdp import fully_shard

    data_parallel = mesh["data_parallel"]
    for layer in loss.model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=data_parallel)
    fully_shard(loss.model, mesh=data_parallel)
    return loss
