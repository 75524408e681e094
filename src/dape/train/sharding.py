"""FSDP2: which parameters travel together, in which dtype, and when."""

from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dape.train.optimize import is_positional

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(
    module: nn.Module, blocks: list[nn.Module], head: nn.Module, mesh: "DeviceMesh", low: bool
) -> None:
    """Shard a module over the ranks of a mesh: a group for each block, for the head, and the rest.

    Masters, gradients and moments are float32. If `low`, the matrices of blocks and head, and the
    vectors added to their products, travel in bfloat16, to which autocast would round them at their
    use: the numbers are those of one device. Gradients are averaged in float32.

    The rest is one group in float32: embeddings, norms, and the parameters of positions, which
    attention reads many times, in blocks of rows or in a kernel. It is gathered once, before the
    forward pass, and stays whole until the backward pass has ended.
    """
    products = {each for name, each in module.named_parameters() if _in_product(name, module)}
    fully_shard(module, mesh=mesh, ignored_params=products)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for group in (*blocks, head):
        rest = set(group.parameters()) - products
        fully_shard(group, mesh=mesh, mp_policy=policy, ignored_params=rest)
    _prefetch([cast(FSDPModule, each) for each in (module, *blocks, head)])


def _in_product(name: str, module: nn.Module) -> bool:
    """Return whether a parameter is a linear layer's, and none of a position scheme."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, nn.Linear) and not is_positional(name)


def _prefetch(groups: list[FSDPModule]) -> None:
    """Let each group gather the next one's weights while it computes, in both directions."""
    for before, after in pairwise(groups):
        before.set_modules_to_forward_prefetch([after])
    for before, after in pairwise(groups[1:]):
        after.set_modules_to_backward_prefetch([before])


def gather_once(module: nn.Module, last: bool) -> None:
    """Gather the weights once a step, and exchange gradients in the `last` of its passes."""
    for group in module.modules():
        if isinstance(group, FSDPModule):
            group.set_requires_gradient_sync(last, recurse=False)
            group.set_reshard_after_forward(False, recurse=False)
            group.set_reshard_after_backward(last, recurse=False)
