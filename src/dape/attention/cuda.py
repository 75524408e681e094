"""The fused kernels, with DAPE V1 across heads in CUDA, and the remaining kernels in Triton."""

from dape.attention.call import Attended, Call
from dape.attention.fused import operator, serves


def obstacle(call: Call) -> str | None:
    """Return the reason against serving a call, or None."""
    return serves.obstacle(call) or serves.cuda_obstacle(call)


def attend(call: Call, lse: bool = False) -> Attended:
    """Return output and log-sum-exp."""
    return operator.attend(call, "cuda")
