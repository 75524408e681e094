"""Random scores and the rows behind them, for adapters that ask for more than A and B."""

import math

import torch

from dape.positions.adapter import Rows


def draw(
    batch=2, heads=4, kv_heads=2, rows=5, keys=7, head_dim=3, causal=True, padding=None,
    positions=None, dtype=torch.float64,
):  # fmt: skip
    """Return A, B and the `Rows`: the last queries of a sequence, `padding` of its keys hidden."""
    query = torch.randn(batch, heads, rows, head_dim, dtype=dtype)
    key = torch.randn(batch, kv_heads, keys, head_dim, dtype=dtype)
    key_positions = torch.arange(keys) if positions is None else positions
    query_positions = key_positions[..., keys - rows :]
    visible = torch.ones(batch, 1, rows, keys, dtype=torch.bool)
    if causal:
        visible = visible.tril(keys - rows)
    if padding is not None:
        visible = visible & (torch.arange(keys) >= torch.tensor(padding)[:, None])[:, None, None]
    scale = 1 / math.sqrt(head_dim)
    scores = query @ key.repeat_interleave(heads // kv_heads, dim=1).mT * scale
    bias = torch.randn(heads, rows, keys, dtype=dtype)
    return scores, bias, Rows(query, key, query_positions, key_positions, visible, scale)
