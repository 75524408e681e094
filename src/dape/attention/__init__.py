"""One operator, several ways to compute it."""

from dape.attention.operator import attention

__all__ = ["attention"]
