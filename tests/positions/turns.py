"""Queries and keys to turn, and the frequencies of RoPE."""

import torch

LENGTH = 32  # train_length


def draw(length, head_dim=16, dtype=torch.float32, batch=2):
    """Return queries of four heads and keys of two."""
    query = torch.randn(batch, 4, length, head_dim, dtype=dtype)
    return query, torch.randn(batch, 2, length, head_dim, dtype=dtype)


def rope(base, width=16):
    """Return the frequencies of pairs of dimensions."""
    return [base ** (-2 * i / width) for i in range(width // 2)]
