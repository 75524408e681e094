"""The start of a sharded model: every rank draws the whole model and keeps its rows."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Larger parameters have no memory until the model is sharded.
LARGE = 2**16
_aten = torch.ops.aten
_FILL = {_aten.normal_.default, _aten.uniform_.default, _aten.zero_.default, _aten.fill_.Scalar}


class Drawing(TorchDispatchMode):
    """A mode in which large tensors are made on the meta device, and filled one at a time.

    A large tensor is filled in a buffer, with the random numbers of a whole model on a single
    device. This rank keeps its rows and drops the buffer. Beside its shard of the model, a device
    holds at most the largest tensor.
    """

    def __init__(self, device: torch.device, rank: int, ranks: int) -> None:
        super().__init__()
        self._device, self._rank, self._ranks = device, rank, ranks
        self._kept: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Move a new large tensor to the meta device, and fill a tensor by way of the buffer."""
        kwargs = dict(kwargs or {})
        if function is _aten.empty.memory_format and torch.Size(args[0]).numel() > LARGE:
            kwargs["device"] = torch.device("meta")
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is not None and target.is_meta and function._schema.is_mutable:
            if function not in _FILL:
                raise NotImplementedError(f"{function} on a tensor that is filled in a buffer")
            whole = torch.empty_strided(
                target.shape, target.stride(), dtype=target.dtype, device=self._device
            )
            function(whole, *args[1:], **kwargs)
            self._kept[id(target)] = own_rows(whole, self._rank, self._ranks).clone()
            return target
        return function(*args, **kwargs)

    def of(self, model: nn.Module) -> dict[str, Tensor]:
        """Return this rank's rows of the parameters on the meta device, by name."""
        return {
            name: self._kept[id(parameter)]
            for name, parameter in model.named_parameters()
            if parameter.is_meta
        }


def own_rows(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """Return the rows of a rank under FSDP2, possibly none."""
    chunks = whole.chunk(ranks)
    return chunks[rank] if rank < len(chunks) else whole[:0]


@torch.no_grad()
def put(module: nn.Module, drawn: dict[str, Tensor]) -> None:
    """Fill the parameters of a sharded module on the meta device with their rows."""
    if drawn:
        device = next(iter(drawn.values())).device
        module._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x)
    parameters = dict(module.named_parameters())
    for name, rows in drawn.items():
        parameters[name].to_local().copy_(rows)  # type: ignore[attr-defined]
