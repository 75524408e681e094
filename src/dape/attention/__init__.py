"""One operator, several ways to compute it."""

from dape.attention import (
    call,
    chunked,
    context_parallel,
    cuda,
    fused,
    operator,
    parallel,
    reference,
    sdpa,
    select,
    triton,
)
from dape.attention.operator import attention

__all__ = ["attention"]

# `dape.attention` is the operator, so `import dape.attention.chunked as c` asks it for its parts.
for part in (
    call,
    chunked,
    context_parallel,
    cuda,
    fused,
    operator,
    parallel,
    reference,
    sdpa,
    select,
    triton,
):
    setattr(attention, part.__name__.rpartition(".")[2], part)
