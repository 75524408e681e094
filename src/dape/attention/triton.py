"""The fused kernels in Triton, on any GPU, and on a CPU by the interpreter."""

from dape.attention.call import Attended, Call
from dape.attention.fused import operator, serves


def obstacle(call: Call) -> str | None:
    """Return the reason against serving a call, or None."""
    return serves.obstacle(call)


def attend(call: Call, lse: bool = False) -> Attended:
    """Return output and log-sum-exp."""
    return operator.attend(call, "triton")
