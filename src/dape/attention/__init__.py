"""One operator, several ways to compute it."""

from dape.attention import chunked, fused, operator, reference, sdpa, select
from dape.attention.operator import attention

__all__ = ["attention"]

# `dape.attention` is the operator, so `import dape.attention.chunked as c` asks it for its parts.
vars(attention).update(
    chunked=chunked, fused=fused, operator=operator, reference=reference, sdpa=sdpa, select=select
)
