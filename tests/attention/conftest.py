"""Fixtures of the tests of attention."""

import pytest
import torch

from dape.attention.fused import plan


@pytest.fixture(scope="session")
def random_calls(benchmarks):
    """Return `benchmarks/random_calls.py`."""
    return benchmarks("random_calls")


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


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def change():
    """Return changes of the sources, old to new; a test may make some."""
    return {}


@pytest.fixture
def emulated(monkeypatch, folder, change):
    """Let the CUDA kernels run here, those across heads alone."""
    import emulator

    from dape.attention.fused import windows
    from dape.attention.fused.cuda import features, forward, mix, taps

    def compiled(module):
        def found(name, *values):
            source = module.source(name, *values)
            for old, new in change.items():
                source = source.replace(old, new)
            return emulator.compiled(source, name, folder)

        return found

    monkeypatch.setattr(forward, "layout_of", lambda problem, terms: None)
    monkeypatch.setattr(windows, "has_room", lambda: True)
    for module in (features, forward, mix, taps):
        monkeypatch.setattr(module, "compiled", compiled(module))
