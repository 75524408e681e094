"""The operator `dape.attention`, and the backends that compute attention."""

from importlib import import_module

from dape.attention.operator import attention

__all__ = ["attention"]

# `dape.attention` is the operator. `import dape.attention.chunked as c` looks up the submodule
# there.
for part in (
    "call",
    "chunked",
    "context_parallel",
    "cuda",
    "fused",
    "operator",
    "parallel",
    "reference",
    "sdpa",
    "select",
    "triton",
):
    setattr(attention, part, import_module(f"{__name__}.{part}"))
