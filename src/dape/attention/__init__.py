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
vars(attention).update(
    call=call,
    chunked=chunked,
    context_parallel=context_parallel,
    cuda=cuda,
    fused=fused,
    operator=operator,
    parallel=parallel,
    reference=reference,
    sdpa=sdpa,
    select=select,
    triton=triton,
)
