"""What every test shares: one thread, one seed, few and always the same hypothesis examples."""

import gc
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

import shapes

torch.set_num_threads(1)
# What processes do first, this one and those that tests start.
sys.path.insert(0, str(Path(__file__).with_name("start")))
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [sys.path[0], os.environ.get("PYTHONPATH")])
)
import_module("sitecustomize")
shapes.quicken()
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is defined
    if find_spec("triton"):
        import interpreter

        interpreter.quicken()
settings.register_profile(
    "dape", deadline=None, max_examples=20, derandomize=True, database=None, print_blob=False
)
settings.load_profile("dape")
# Files of up to a minute. They begin first, so that no process waits for another at the end.
LONG = (
    "test_parallelize.py", "test_campaign.py", "test_quickstart.py", "test_contributing.py",
    "test_many_gpus.py", "test_cuda_emulated.py", "test_fused.py", "test_fused_range.py",
    "test_model_compile.py", "test_exporting.py", "test_large_run.py", "test_shared_memory.py",
    "test_generation.py", "test_comparing.py", "test_loop.py", "test_faults.py",
)  # fmt: skip
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="session")
def benchmarks():
    """Return a module of the folder `benchmarks` by name; they import each other as scripts do."""
    sys.path.append(str(BENCHMARKS))
    yield import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Skip files of tests that import Triton where there is none, as on macOS."""
    report = yield
    needed = "No module named 'triton", "import of triton halted"
    if report.failed and not find_spec("triton") and any(x in report.longreprtext for x in needed):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, "needs Triton")
    return report


def pytest_collection_finish():
    import_module("compiler").quicken()
    gc.collect()
    gc.freeze()  # what is imported stays, and no collection need look through it


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)  # keeps the order otherwise
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and PyTorch sees none"))
