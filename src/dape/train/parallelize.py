"""The layout of a model over devices: the distributed code, outside the model."""

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.modeling_layers import GradientCheckpointingLayer

from dape.attention.context_parallel import ContextParallel
from dape.errors import UserError
from dape.ranks import check_launched, local_ranks, ranks
from dape.train.drawing import Drawing, put
from dape.train.recipe import Settings
from dape.train.recompute import recomputed
from dape.train.sections import Hardware
from dape.train.sharding import shard
from dape.train.task import Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.distributed.device_mesh import DeviceMesh

PRECISION = {"bf16-mixed": "bf16-mixed", "fp32": "32-true"}


def device(hardware: Hardware) -> torch.device:
    """Return the kind of device to train on.

    Raises:
        UserError: for fewer GPUs than processes on this machine.
    """
    gpus, processes = torch.cuda.device_count(), local_ranks()
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
    check_launched()
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy: Any = "auto"
    if ranks() > 1 and recipe.hardware.strategy == "ddp":
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # Fabric's doing
        strategy = DDPStrategy()
    elif ranks() > 1:
        strategy = ModelParallelStrategy(
            sharded, data_parallel_size=ranks(), tensor_parallel_size=1
        )
    local = local_ranks()
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
    """The loss of a task as a module, as an exchange of gradients requires.

    `drawn` holds this rank's rows of the parameters without memory before sharding.
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
    """Return the model of a task, drawn from the seed, and rows of its large parameters.

    Under FSDP, large parameters are on the meta device, and their rows for this rank come second.
    """
    if fabric.world_size == 1 or task.recipe.hardware.strategy == "ddp":
        return task.build(fabric.device), {}
    with Drawing(fabric.device, fabric.global_rank, fabric.world_size) as drawing:
        model = task.build(fabric.device)
    return model, drawing.of(model)


def parallelize(
    fabric: "Fabric", model: nn.Module, task: Task, drawn: dict[str, torch.Tensor]
) -> nn.Module:
    """Return the loss of `model` for the devices: checkpointed, compiled, sharded or copied."""
    hardware = task.recipe.hardware
    graphs = hardware.compile == "graphs" and fabric.device.type == "cuda"
    compiled, kept = graphs or hardware.compile == "blocks", hardware.activation_checkpointing
    for block in blocks(model) if compiled or kept != "none" else ():
        if kept != "none":
            block.forward = recomputed(block.forward, kept)
        if compiled:
            block.forward = torch.compile(block.forward)
    if compiled:
        # Float32 products stay exact, against the compiler's advice.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        # The compiler warns of in-place operations under checkpoints, and has removed them by then.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        # Uncompiled, softmax and gradient of the float32 logits take a tenth of a step. A second
        # pass over the logits of a token reads the cache, and a rescaled sum costs more.
        loss: Any = model.loss_function
        compiled_loss = torch.compile(loss, options={"online_softmax": False})
        model.loss_function = compiled_loss  # type: ignore
    if hardware.strategy == "ddp" and fabric.world_size > 1:
        for parameter in model.parameters():
            if 1 in parameter.shape and parameter.requires_grad:
                parameter.register_hook(_with_plain_strides)
    # Parameters without memory come to the device when they are sharded, without a warning.
    return fabric.setup_module(Loss(model, task, drawn), move_to_device=not drawn)


def _with_plain_strides(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient with the strides of a new tensor, as DDP expects."""
    return gradient.flatten().view_as(gradient)


def context_parallel(fabric: "Fabric", hardware: Hardware) -> ContextParallel | None:
    """Return the devices that share sequences with this device, None for a single device.

    The devices are neighbours, mostly on the same machine.
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
        UserError: for a model that marks no blocks.
    """
    found = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not found:
        raise UserError(
            f"{type(model).__name__} does not mark blocks; leave out hardware.compile,"
            " hardware.activation_checkpointing and hardware.strategy=fsdp"
        )
    return found


def sharded(loss: Loss, mesh: "DeviceMesh") -> Loss:
    """Shard a model over all ranks (FSDP2); Fabric passes the mesh."""
    low = loss.task.recipe.training.precision == "bf16-mixed"
    shard(loss, blocks(loss.model), mesh["data_parallel"], low)
    put(loss, {f"model.{name}": rows for name, rows in loss.drawn.items()})
    loss.drawn.clear()
    return loss
