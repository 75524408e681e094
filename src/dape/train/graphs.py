"""The forward and backward pass of a micro-batch as a CUDA graph, recorded once and replayed.

The host starts hundreds of kernels for a micro-batch, and for a small model the starts take longer
than the computation. A graph starts all kernels at once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dape.device import waiting_forbidden
from dape.errors import behind, first_line, out_of_memory

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Compilation, the tuning of kernels and the workspaces of libraries must be over before recording.
WARM_UP = 3


class Unrecordable(RuntimeError):
    """A pass that copies from the host or waits for the device, and cannot be recorded."""


class Recording:
    """Forward and backward pass of a batch, by a replay of a graph per micro-batch.

    A graph reads and adds to fixed addresses. Micro-batches are copied to the address of the first.
    Gradients exist from the start in a single buffer, and a call averages the buffer over devices.

    Args:
        fabric: the devices; every device records a graph.
        loss: the map from a micro-batch to the mean loss, set up by `fabric`.
        part: a micro-batch of this rank; all micro-batches have equal shapes.
        parts: number of micro-batches in a batch.

    Raises:
        Unrecordable: if the pass cannot be recorded; gradients are then zero.
    """

    def __init__(
        self, fabric: "Fabric", loss: nn.Module, part: Sequence[Tensor], parts: int
    ) -> None:
        self._fabric, self._loss, self._parts = fabric, loss, parts
        self._gradients = _flat_gradients(loss)
        self._part = [tensor.to(fabric.device, copy=True) for tensor in part]
        try:
            self._warm_up()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._part_loss = self._pass()
        except RuntimeError as error:
            for each in behind(error):  # the end of a recording has an error of its own
                if isinstance(each, KeyboardInterrupt):
                    raise each from None
            if out_of_memory(error):
                raise
            raise Unrecordable(first_line(error)) from error
        finally:
            self._gradients.zero_()

    def accumulate(self, parts: Sequence[Sequence[Tensor]]) -> Float[Tensor, ""]:
        """Add the gradient of the mean loss over all ranks' micro-batches; return the loss."""
        total = torch.zeros((), device=self._fabric.device)
        for part in parts:
            for place, tensor in zip(self._part, part, strict=True):
                place.copy_(tensor, non_blocking=True)
            self._graph.replay()
            total += self._part_loss
        if self._fabric.world_size > 1:
            average = torch.distributed.ReduceOp.AVG
            torch.distributed.all_reduce(self._gradients, op=average)
        mean: Tensor = self._fabric.all_reduce(total, reduce_op="mean")
        return mean

    def _pass(self) -> Float[Tensor, ""]:
        """Add the gradient of a micro-batch on this rank, and return its share of the loss."""
        with self._fabric.no_backward_sync(self._loss):
            loss = self._loss(*self._part) / self._parts
            self._fabric.backward(loss)
        return loss.detach()

    def _warm_up(self) -> None:
        """Run the pass on a separate stream, as for recording, without a wait for the GPU."""
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._pass()
            with waiting_forbidden():
                self._pass()
        main.wait_stream(side)


def _flat_gradients(module: nn.Module) -> Float[Tensor, " parameters"]:
    """Give every trained parameter a gradient of zeros; return the buffer of all gradients."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in trained]
    buffer = torch.zeros(sum(sizes), device=trained[0].device)
    for parameter, part in zip(trained, buffer.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)
    return buffer
