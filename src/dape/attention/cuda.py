"""The fused kernels, those across the heads of DAPE V1 in CUDA, the others in Triton."""

from dape.attention.call import Attended, Call
from dape.attention.fused import operator, serves


def obstacle(call: Call) -> str | None:
    """Return why the kernels cannot serve a call, or None if they can."""
    return serves.obstacle(call) or serves.cuda_obstacle(call)


def attend(call: Call, lse: bool = False) -> Attended:
    """Return output and log-sum-exp."""
    return operator.attend(call, "cuda")
