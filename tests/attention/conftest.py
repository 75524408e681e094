"""Fixtures of the tests of attention."""

import pytest
import torch


@pytest.fixture
def unwritten_memory_is_nan():
    """Let nothing pass that a kernel did not write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
