"""Fixtures of the tests of attention."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from dape.attention.fused import plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def random_calls():
    """Return `benchmarks/random_calls.py`."""
    spec = spec_from_file_location("random_calls", BENCHMARKS / "random_calls.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def unwritten_memory_is_nan():
    """Let nothing pass that a kernel did not write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_plans_of_other_tests():
    """Let a test that changes what launchers do make its own plans."""
    plan.calls_of.cache_clear()
