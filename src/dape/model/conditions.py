"""Conditions of the data: looked at in a call, asserted in the graph of a compiled call."""

import torch
from torch import Tensor
from transformers.utils import is_tracing

from dape.errors import UserError


def look(condition: bool | Tensor) -> bool | Tensor:
    """Return a condition as a bool; a tensor itself while nobody can look at the tensor.

    Nobody can while a model is traced or captured in a CUDA graph. A condition on the device `meta`
    has no data, and counts as false.
    """
    if not isinstance(condition, Tensor):
        return condition
    captured = condition.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured or is_tracing(condition):
        return condition
    return not condition.is_meta and bool(condition)


def assumed(condition: bool | Tensor) -> bool | Tensor:
    """Return true for a tensor of an exported program, whose graph holds the general case alone."""
    exporting = torch.compiler._is_exporting_flag or unchecked()
    return True if isinstance(condition, Tensor) and exporting else condition


def refuse(condition: bool | Tensor, error: str) -> None:
    """Refuse a condition that holds. A tensor is looked at when the compiled graph runs.

    Args:
        condition: a result of `look`.
        error: text of less than 255 characters, the most that a GPU prints.

    Raises:
        UserError: if the condition holds, or if nothing will look; compiled code raises a
            `RuntimeError`.
    """
    if isinstance(condition, Tensor):
        if unchecked():
            raise UserError(
                "ONNX and torch.jit.trace keep no check of values; export without the argument, or "
                f"by torch.export: {error}"
            )
        torch._assert_async(~condition, error)
    elif condition:
        raise UserError(error)


@torch.compiler.assume_constant_result  # a compiler takes the answer of PyTorch for false
def unchecked() -> bool:
    """Return whether checks of values are left out of the graph, as in ONNX and in a trace."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or torch.onnx.is_in_onnx_export()
