import math

import numpy as np
import pytest
import torch

from dape.errors import UserError, check_finite, check_switch, check_whole, out_of_memory


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "size=0 must be at least 1"),
        (2**63, f"size={2**63} must be less than 2\\*\\*63"),
        (1.0, "size=1.0 must be a whole number"),
        (True, "size=True must be a whole number"),
        (math.nan, "size=nan must be a whole number"),
        ("1", "size='1' must be a whole number"),
        (None, "size=None must be a whole number"),
    ],
)
def test_what_is_no_whole_number_is_refused(value, message):
    with pytest.raises(UserError, match=message):
        check_whole(size=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", True, None, 1j])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(UserError, match=r"scale=.* must be a finite number"):
        check_finite(scale=value)


def test_numbers_of_any_kind_are_taken():
    check_whole(a=1, b=np.int64(3), c=2**63 - 1)
    check_whole(-5, a=-5)
    check_finite(1, a=1, b=1.5, c=np.float32(2))
    check_switch(a=True, b=False)
    with pytest.raises(UserError, match=r"b=0.5 must be at least 1"):
        check_finite(1, a=1, b=0.5)
    with pytest.raises(UserError, match="causal='no' must be True or False"):
        check_switch(causal="no")


class Compiler(RuntimeError):
    """Stands for the error of a compiler around another."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10**15,), np.dtype("int64")),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.OutOfMemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
        RuntimeError("std::bad_alloc"),
        Compiler("backend='inductor' raised: OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_too_little_memory_is_known_whoever_reports_it(error):
    assert out_of_memory(error)
    try:
        try:
            raise error
        except type(error):
            raise RuntimeError("a previous error during capture")  # noqa: B904
    except RuntimeError as later:
        assert out_of_memory(later), "the end of a recording has an error of its own"


def test_memory_that_was_too_small_on_this_machine_is_known():
    for size in (2**45, 2**62):
        with pytest.raises(RuntimeError) as found:
            torch.empty(size, dtype=torch.float64)
        assert out_of_memory(found.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("memory"),
    ],
)
def test_other_errors_are_no_lack_of_memory(error):
    error.__context__, error.__suppress_context__ = MemoryError(), True  # as `raise ... from None`
    assert not out_of_memory(error)
