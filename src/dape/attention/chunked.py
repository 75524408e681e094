"""Blocks of query rows, recomputed in the backward pass, with memory linear in the length."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dape.attention import reference
from dape.attention.call import Attended, Call
from dape.errors import UserError

# Most scores in a block: 16 MiB of float32 on a CPU, enough to fill a GPU.
SCORES_PER_BLOCK = {"cpu": 2**22, "cuda": 2**26}


def obstacle(call: Call) -> str | None:
    """Return None, because chunked serves every call."""


def rows_per_block(call: Call) -> int:
    """Return the number of query rows in a block, all for an unknown length."""
    batch, heads, rows, _ = call.query.shape
    if torch.compiler.is_exporting():
        return rows
    budget = SCORES_PER_BLOCK.get(call.query.device.type, SCORES_PER_BLOCK["cpu"])
    return max(1, min(rows, budget // (batch * heads * call.key.shape[2])))


def attend(call: Call, lse: bool = False) -> Attended:
    """Return the output, and with `lse` the log-sum-exp of the logits of each row.

    In causal use, a block reads no keys after the last query of the block. Transforms of
    `torch.func` have no recomputation. Under a transform the backward pass keeps every block, with
    the memory of `reference`.
    """
    total, keys, shift = call.query.shape[2], call.key.shape[2], call.shift
    # In float32 before the cut, because gradients of keys are sums over blocks.
    whole = call.widened()

    def block(start: int, stop: int) -> tuple[Tensor, Any]:
        seen = keys
        if call.causal and isinstance(shift, int):
            seen = max(1, min(keys, shift + stop))
        found = reference.attend(whole.part(slice(start, stop), slice(0, seen)), lse)
        return found.out, found.lse

    size = rows_per_block(call)
    if size >= total:  # no loop, because compilation would unroll a loop for a single length
        out, log_sums = block(0, total)
        return Attended(out, log_sums)
    blocks = []
    again = block if torch.compiler.is_compiling() else Again(block, whole).compute
    # The largest first, because the others fit into the freed memory.
    for start in reversed(range(0, total, size)):
        stop = min(start + size, total)
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            blocks.append(checkpoint(again, start, stop, use_reentrant=False))
        else:
            blocks.append(block(start, stop))
    outputs, sums = zip(*blocks[::-1], strict=True)
    return Attended(torch.cat(outputs, dim=2), torch.cat(sums, dim=2) if lse else None)


class Again(nn.Module):
    """A function of a block that computes the same again in the backward pass.

    `torch.func.functional_call` lends parameters to bias and adapter for the forward pass alone,
    and parameters and tensors of the call may be overwritten. A compiled graph holds all tensors
    itself.
    """

    def __init__(self, block: Callable[[int, int], tuple[Tensor, Any]], call: Call) -> None:
        super().__init__()
        self.block = block
        modules = (call.bias, call.adapter)
        self.parts = nn.ModuleList(each for each in modules if isinstance(each, nn.Module))
        self.lent = self.tensors()
        # Not the buffers, which a forward may write, as that of a batch normalisation does.
        inputs = [*(x for x in call if isinstance(x, Tensor)), *self.parameters()]
        self.versions = [(x, x._version) for x in inputs if not x.is_inference()]

    def tensors(self) -> dict[str, Tensor]:
        """Return the present parameters and buffers of bias and adapter."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def compute(self, start: int, stop: int) -> tuple[Tensor, Any]:
        """Return the block, with the first parameters and buffers.

        Raises:
            UserError: for an overwritten parameter or tensor of the call.
        """
        if any(tensor._version != version for tensor, version in self.versions):
            raise UserError(
                "a tensor given to dape.attention, or a parameter of its bias or adapter, was "
                "overwritten before the backward pass, which computes from it again; overwrite "
                "after the backward pass, or give a copy"
            )
        now = self.tensors()
        if all(now.get(name) is tensor for name, tensor in self.lent.items()):
            return self.block(start, stop)
        found: tuple[Tensor, Any] = functional_call(self, self.lent, (start, stop))
        return found

    def forward(self, start: int, stop: int) -> tuple[Tensor, Any]:
        """Return the block, with the parameters at hand."""
        return self.block(start, stop)
