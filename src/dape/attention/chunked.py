"""Blocks of query rows, each recomputed in the backward pass: memory linear in the length."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dape.attention.reference import attend, log_sum_exp, visibility

# How many scores a block may hold: 16 MiB of float32 on a CPU, enough to fill a GPU on one.
SCORES_PER_BLOCK = {"cpu": 2**22, "cuda": 2**26}


def rows_per_block(query: Float[Tensor, "batch heads query head_dim"], keys: int) -> int:
    """Return how many query rows one block takes: all where the length is not known yet."""
    if torch.compiler.is_exporting():
        return query.shape[2]
    budget = SCORES_PER_BLOCK.get(query.device.type, SCORES_PER_BLOCK["cpu"])
    return max(1, min(query.shape[2], budget // (query.shape[0] * query.shape[1] * max(keys, 1))))


def attend_chunked(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    value: Float[Tensor, "batch kv_heads key value_dim"],
    query_positions: Int[Tensor, "*batch query"],
    key_positions: Int[Tensor, "*batch key"],
    mask: Bool[Tensor, "#batch 1 #query key"] | None,
    bias: nn.Module | None,
    adapter: nn.Module | None,
    scale: float,
    causal: bool,
    query_offset: int | Int[Tensor, ""],
    return_lse: bool,
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"] | None]:
    """Return the output of `attend`, and the log-sum-exp of the logits of each row if asked for.

    In blocks: keys after a block's last query are not read. Under a transform of `torch.func`,
    which knows no recomputation, the backward pass keeps every block: memory is then that of
    `reference`.
    """
    total, keys = query.shape[2], key.shape[2]

    def block(start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        seen = keys
        if causal and isinstance(query_offset, int):
            seen = max(1, min(keys, query_offset + stop))
        rows, columns = slice(start, stop), slice(0, seen)
        part = mask
        if mask is not None:
            part = mask[..., rows if mask.shape[2] > 1 else slice(None), columns]
        visible = visibility(stop - start, seen, part, causal, query_offset + start, query.device)
        out, _, logits = attend(
            query[:, :, rows],
            key[:, :, columns],
            value[:, :, columns],
            query_positions[..., rows],
            key_positions[..., columns],
            visible,
            bias,
            adapter,
            scale,
        )
        return out, log_sum_exp(logits, visible) if return_lse else None

    size = rows_per_block(query, keys)
    if size >= total:  # no loop, which compilation would unroll for this one length
        return block(0, total)
    blocks = []
    # The largest first: what it frees serves all others. As they grow, a heap would grow by each.
    for start in reversed(range(0, total, size)):
        stop = min(start + size, total)
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            blocks.append(checkpoint(block, start, stop, use_reentrant=False))
        else:
            blocks.append(block(start, stop))
    outputs, sums = zip(*blocks[::-1], strict=True)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2) if return_lse else None
