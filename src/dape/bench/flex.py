"""FlexAttention for biases, by formula or by table; adapters across heads do not fit."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dape.bench.case import Attend, Case, Parts
from dape.errors import UserError
from dape.positions.bias import ALiBi, Kerple

BLOCK = 128  # FlexAttention's own default

# Score, batch, head, query and key to the logit.
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def by_formula(case: Case, parts: Parts) -> Attend:
    """Return attention with the bias computed by formula inside the kernel."""
    bias = parts.bias
    if bias is not None and type(bias) not in (ALiBi, Kerple):
        raise UserError(f"no score_mod is written for {type(bias).__name__}")
    return attend(case, parts, lambda: formula(bias, case.device))


def by_table(case: Case, parts: Parts) -> Attend:
    """Return attention with the bias read from a table over the distance, made in every call."""
    bias = parts.bias
    if bias is None:
        raise UserError("the scheme has no bias for a table")
    if not getattr(bias, "relative", False):
        raise UserError(f"{type(bias).__name__} depends on more than the distance")
    distances = torch.arange(case.length, device=case.device)
    return attend(case, parts, lambda: table(bias(distances, distances[:1])[..., 0]))


def attend(case: Case, parts: Parts, score_mod: Callable[[], ScoreMod | None]) -> Attend:
    """Return compiled causal attention, with a new `score_mod` in every call."""
    check(case, parts)
    torch.compiler.reset()  # the compiler would give up after a few lengths
    flexible = torch.compile(flex_attention, dynamic=False)
    mask = causal_mask(case.length, case.device)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flexible(query, key, value, score_mod=score_mod(), block_mask=mask)

    return attention


def check(case: Case, parts: Parts) -> None:
    """Raise a `UserError` for a case that FlexAttention cannot compute."""
    if parts.adapter is not None:
        raise UserError("score_mod sees the scores of a single head, the adapter needs all")
    if case.device.type == "cpu":
        raise UserError("FlexAttention has no backward pass on a CPU")
    if case.length % BLOCK:
        raise UserError(f"the length is not a multiple of {BLOCK}, the block of the mask")


def formula(bias: nn.Module | None, device: torch.device) -> ScoreMod | None:
    """Return the score_mod of a bias's formula, or None without a bias."""
    if isinstance(bias, ALiBi):
        slopes = bias.slopes(device)
        return lambda score, batch, head, i, j: score - slopes[head] * (i - j).abs()
    if isinstance(bias, Kerple):
        p, a = bias.p, bias.a
        return lambda score, batch, head, i, j: (
            score - p[head] * torch.log1p(a[head] * (i - j).abs())
        )
    return None


def table(values: Tensor) -> ScoreMod:
    """Return the score_mod of a table `[H, N]` over the distances 0..N-1."""
    values = values.clone()  # FlexAttention loses the gradient of a captured view
    return lambda score, batch, head, i, j: score + values[head, (i - j).abs()]


def causal_mask(length: int, device: torch.device) -> BlockMask:
    """Return the mask of `j <= i`, for whole blocks; made without a matrix of all pairs."""
    blocks = torch.arange(length // BLOCK, dtype=torch.int32, device=device)
    before = blocks.expand(len(blocks), -1).contiguous()
    return BlockMask.from_kv_blocks(
        kv_num_blocks=torch.ones_like(blocks)[None, None],
        kv_indices=(blocks[:, None] - before).remainder(len(blocks))[None, None],
        full_kv_num_blocks=blocks[None, None],
        full_kv_indices=before[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda batch, head, i, j: j <= i,
    )
