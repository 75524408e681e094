"""FSDP2: groups of parameters, and dtype and time of their exchange."""

from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(module: nn.Module, blocks: list[nn.Module], mesh: "DeviceMesh", low: bool) -> None:
    """Shard a module over a mesh: a group for each block's products, and a group for the remainder.

    Masters, gradients and moments are float32, and gradients are averaged in float32. If `low`, the
    parameters of linear layers travel in bfloat16. Autocast rounds them to bfloat16 on a single
    device too, with equal results.

    Embedding, head, norms and parameters of positions are the last group, in float32. Attention
    reads parameters of positions many times, in blocks of rows or in a kernel. Therefore the last
    group is gathered once, before the forward pass, and stays whole until the backward pass ends.
    """
    linear = [each for block in blocks for each in block.modules() if isinstance(each, nn.Linear)]
    products = {parameter for each in linear for parameter in each.parameters()}
    fully_shard(module, mesh=mesh, ignored_params=products)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks:
        rest = set(block.parameters()) - products
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=rest)
    _prefetch(cast(FSDPModule, module), cast(list[FSDPModule], blocks))


def _prefetch(root: FSDPModule, blocks: list[FSDPModule]) -> None:
    """Prefetch the weights of the next block during a block's computation, both ways."""
    for before, after in pairwise([root, *blocks]):
        before.set_modules_to_forward_prefetch([after])
    for before, after in pairwise(blocks):
        after.set_modules_to_backward_prefetch([before])


def gather_once(module: nn.Module, last: bool) -> None:
    """Gather the weights once a step, and exchange gradients in the `last` pass of the step."""
    for group in module.modules():
        if isinstance(group, FSDPModule):
            group.set_requires_gradient_sync(last, recurse=False)
            group.set_reshard_after_forward(False, recurse=False)
            group.set_reshard_after_backward(last, recurse=False)
