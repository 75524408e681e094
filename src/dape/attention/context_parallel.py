"""A sequence over several devices: a device has some queries, and gathers all keys and values.

Of n devices, device r holds chunks r and 2n - 1 - r of 2n chunks of the sequence. In causal
attention the cost of a query is the number of earlier keys. With two chunks, all devices therefore
compute equally much. Keys and values are gathered in order, and a chunk of queries is a call of the
operator with whole rows. Therefore every scheme is exact, and every backend serves the call.

Gathering takes memory for the keys and values of the whole sequence, in a layer at a time. A ring
of exchanges, merged by the log-sum-exp, would take an n-th, and would hide the exchange behind the
products. Memory and exchange are small beside the products, because products grow with the square
of the length.
"""

from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from dape.attention.operator import attention
from dape.errors import UserError
from dape.ranks import check_launched, local_rank, local_ranks, ranks

Value = TypeVar("Value")


class ContextParallel(NamedTuple):
    """The devices that share a sequence, by the name of the process group.

    `end` is the number of tokens before the padding at the end of a sequence, None without padding.
    """

    group: str
    rank: int
    ranks: int
    end: int | None = None

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return this device's two chunks of a tensor of the whole sequence.

        The length along `dim` is a multiple of twice the number of devices.
        """
        chunks = x.chunk(2 * self.ranks, dim)
        return torch.cat((chunks[self.rank], chunks[-1 - self.rank]), dim)

    def positions(self, length: int, device: torch.device) -> Int[Tensor, " length"]:
        """Return the positions in the sequence of the `length` tokens of this device.

        Padding has the last position of the sequence, which every table of positions has.
        """
        return self.part(self.all_positions(length, device), dim=0)

    def all_positions(self, length: int, device: torch.device) -> Int[Tensor, " sequence"]:
        """Return the positions of a sequence of which each device has `length` tokens."""
        index = torch.arange(length * self.ranks, device=device)
        return index if self.end is None else index.clamp(max=self.end - 1)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all devices' tensors, in place."""
        dist.all_reduce(x, group=_group(self.group))
        return x

    def of_first(self, value: Value) -> Value:
        """Return the value of the first device on all devices."""
        values = [value]
        dist.broadcast_object_list(values, group=_group(self.group), group_src=0)
        return values[0]

    def attention(
        self,
        query: Float[Tensor, "batch heads part head_dim"],
        key: Float[Tensor, "batch kv_heads part head_dim"],
        value: Float[Tensor, "batch kv_heads part value_dim"],
        bias: nn.Module | None = None,
        adapter: nn.Module | None = None,
        causal: bool = True,
        query_offset: int = 0,
        **options: Any,
    ) -> Float[Tensor, "batch heads part value_dim"]:
        """Return `dape.attention` of the queries of this device over the keys of all."""
        keys, values = (gather(x, self.group, self.ranks) for x in (key, value))
        rows, outs = query.shape[2] // 2, list[Tensor]()
        for chunk, queries in zip(
            (self.rank, 2 * self.ranks - 1 - self.rank), query.split(rows, dim=2), strict=True
        ):
            start = query_offset + chunk * rows
            seen = slice(0, start + rows if causal else None)
            out = attention(
                queries, keys[:, :, seen], values[:, :, seen], bias, adapter, causal,
                query_offset=start, **options,
            )  # fmt: skip
            outs.append(cast(Tensor, out))
        return torch.cat(outs, dim=2)


def over_all_processes(device: torch.device) -> tuple[ContextParallel | None, torch.device]:
    """Return the devices of all processes of `torchrun`, and the device of this process.

    A single process keeps the requested device, and shares no sequence.

    Raises:
        UserError: for fewer GPUs than processes on this machine, and for processes that no launcher
            started.
    """
    if ranks() == 1:
        return None, device
    check_launched()
    if device.type == "cuda":
        gpus, processes = torch.cuda.device_count(), local_ranks()
        if gpus < processes:
            raise UserError(
                f"--device {device}: {processes} processes for {gpus} GPUs; start {gpus} with"
                f" `torchrun --nproc_per_node={gpus}`, or take --device cpu"
            )
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    return ContextParallel(world.group_name, world.rank(), world.size()), device


def _group(name: str) -> dist.ProcessGroup:
    found: dist.ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore
    return found


@torch.library.custom_op("dape::gather", mutates_args=())
def gather(part: Tensor, group: str, ranks: int) -> Tensor:
    """Return the whole sequence, along axis 2, from the parts of all devices."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(ranks)]
    dist.all_gather(parts, part, _group(group))
    first, second = zip(*(each.chunk(2, dim=2) for each in parts), strict=True)
    return torch.cat((*first, *reversed(second)), dim=2)


@gather.register_fake
def _(part: Tensor, group: str, ranks: int) -> Tensor:
    return part.new_empty(*part.shape[:2], part.shape[2] * ranks, *part.shape[3:])


@torch.library.custom_op("dape::scatter_sum", mutates_args=())
def scatter_sum(whole: Tensor, group: str, ranks: int) -> Tensor:
    """Return this device's part of the sum of all devices' `whole`, summed in float32."""
    chunks = whole.to(torch.promote_types(whole.dtype, torch.float32)).chunk(2 * ranks, dim=2)
    parts = [torch.cat((chunks[r], chunks[-1 - r]), dim=2) for r in range(ranks)]
    part = torch.empty_like(parts[0])
    dist.reduce_scatter(part, parts, group=_group(group))
    return part.to(whole.dtype)


@scatter_sum.register_fake
def _(whole: Tensor, group: str, ranks: int) -> Tensor:
    return whole.new_empty(*whole.shape[:2], whole.shape[2] // ranks, *whole.shape[3:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.where = inputs


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return scatter_sum(grad, *ctx.where), None, None


gather.register_autograd(_gradient, setup_context=_setup)
