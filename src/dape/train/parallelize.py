"""How one model is laid out over devices: everything that is distributed, outside the model."""

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.modeling_layers import GradientCheckpointingLayer

from dape.attention.context_parallel import ContextParallel
from dape.errors import UserError
from dape.train.drawing import Drawing, put
from dape.train.recipe import Settings
from dape.train.recompute import recomputed
from dape.train.sections import Hardware
from dape.train.sharding import shard
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
    """Return Lightning's Fabric, started: a single device, DDP, or FSDP2."""
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

    for chatty in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    strategy: Any = "auto"
    if ranks() > 1 and recipe.hardware.strategy == "ddp":
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # Fabric's doing
        strategy = DDPStrategy()
    elif ranks() > 1:
        strategy = ModelParallelStrategy(
            sharded, data_parallel_size=ranks(), tensor_parallel_size=1
        )
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
    """The loss of a task as a module of the model, so that calling it exchanges gradients.

    `drawn` are this rank's rows of the parameters that have no memory until they are sharded.
    """

    def __init__(self, model: nn.Module, task: Task, drawn: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.drawn = drawn

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of the examples of a batch."""
        return self.task.loss(self.model, *batch)


def start(fabric: "Fabric", task: Task) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return the model of a task as its seed draws it: whole, or where it is sharded in parts.

    In parts, large parameters are on the meta device, and this rank's rows of them come second.
    """
    if fabric.world_size == 1 or task.recipe.hardware.strategy == "ddp":
        return task.build(fabric.device), {}
    with Drawing(fabric.device, fabric.global_rank, fabric.world_size) as drawing:
        model = task.build(fabric.device)
    return model, drawing.of(model)


def parallelize(
    fabric: "Fabric", model: nn.Module, task: Task, drawn: dict[str, torch.Tensor]
) -> nn.Module:
    """Return the loss of `model` as the devices compute it: checkpoint, compile, shard or copy."""
    hardware = task.recipe.hardware
    graphs = hardware.compile == "graphs" and fabric.device.type == "cuda"
    compiled, kept = graphs or hardware.compile == "blocks", hardware.activation_checkpointing
    for block in blocks(model) if compiled or kept != "none" else ():
        if kept != "none":
            block.forward = recomputed(block.forward, kept)
        if compiled:
            block.forward = torch.compile(block.forward)
    if compiled:
        # Float32 products stay exact, whatever the compiler advises.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        # The compiler has no operations in place by then, of which it warns with checkpoints.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        # Uncompiled, logits in float32, their softmax and their gradient take a tenth of a step.
        model.loss_function = torch.compile(model.loss_function)  # type: ignore
    if hardware.strategy == "ddp" and fabric.world_size > 1:
        for parameter in model.parameters():
            if 1 in parameter.shape and parameter.requires_grad:
                parameter.register_hook(_with_plain_strides)
    return fabric.setup_module(Loss(model, task, drawn))


def _with_plain_strides(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient whose axes of one entry have the stride of a new tensor, as DDP expects."""
    return gradient.flatten().view_as(gradient)


def context_parallel(fabric: "Fabric", hardware: Hardware) -> ContextParallel | None:
    """Return the devices over which this one's sequences are spread, None if it is one.

    They are neighbours: with several machines, mostly of one.
    """
    size = hardware.context_parallel
    if size == 1:
        return None
    shape, names = (fabric.world_size // size, size), ("data_parallel", "context_parallel")
    mesh = init_device_mesh(fabric.device.type, shape, mesh_dim_names=names)["context_parallel"]
    return ContextParallel(mesh.get_group().group_name, mesh.get_local_rank(), size)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model of this package or of transformers.

    Raises:
        UserError: if it marks none.
    """
    found = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not found:
        raise UserError(
            f"{type(model).__name__} does not say what its blocks are; leave out hardware.compile,"
            " hardware.activation_checkpointing and hardware.strategy=fsdp"
        )
    return found


def sharded(loss: Loss, mesh: "DeviceMesh") -> Loss:
    """Shard a model over all ranks (FSDP2); Fabric calls it with its mesh."""
    low = loss.task.recipe.training.precision == "bf16-mixed"
    shard(loss, blocks(loss.model), mesh["data_parallel"], low)
    put(loss, {f"model.{name}": rows for name, rows in loss.drawn.items()})
    loss.drawn.clear()
    return loss
