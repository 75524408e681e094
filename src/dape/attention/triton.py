"""The fused kernels, all in Triton: any GPU, and a CPU by the interpreter."""

from dape.attention.call import Attended, Call
from dape.attention.fused import operator, serves


def obstacle(call: Call) -> str | None:
    """Return why the kernels cannot serve a call, or None if they can."""
    return serves.obstacle(call)


def attend(call: Call, lse: bool = False) -> Attended:
    """Return output and log-sum-exp."""
    return operator.attend(call, "triton")
