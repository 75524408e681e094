"""Kernels that start beside the kernel before: on which GPUs, and as the driver's header says."""

import json
import shutil
import subprocess
from ctypes import sizeof
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from dape.attention.fused import overlap
from dape.attention.fused.cuda import launch

INCLUDE = Path(triton.__file__).parent / "backends/nvidia/include"
PROGRAM = r"""
#include <cstddef>
#include <cstdio>
#include <cuda.h>
int main() {
  printf("[[%zu, %zu, %zu, %zu], [%zu, %zu], %d]", sizeof(CUlaunchConfig),
         offsetof(CUlaunchConfig, sharedMemBytes), offsetof(CUlaunchConfig, hStream),
         offsetof(CUlaunchConfig, attrs), sizeof(CUlaunchAttribute),
         offsetof(CUlaunchAttribute, value),
         (int)CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
}
"""


@pytest.mark.parametrize(
    ("driver", "capability", "overlaps"),
    [(12020, (9, 0), False), (12030, (9, 0), True), (13000, (8, 9), False), (13000, (12, 0), True)],
)
def test_a_capable_gpu_with_a_capable_driver_overlaps_kernels(
    monkeypatch, driver, capability, overlaps
):
    def version(given):
        given._obj.value = driver
        return 0

    library = SimpleNamespace(cuDriverGetVersion=version)
    monkeypatch.setattr(overlap, "_has_gpu", lambda: True)
    monkeypatch.setattr(overlap, "_get_gpu_runtime_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    overlap._capable.cache_clear()
    assert overlap.overlaps() is overlaps
    overlap._capable.cache_clear()


def test_the_interpreter_and_foreign_kernels_never_overlap(monkeypatch):
    monkeypatch.setattr(overlap, "overlaps", lambda: True)
    interpreted = SimpleNamespace(arg_names=("x", "CHAINED"))
    assert overlap.chained(interpreted) == {"CHAINED": False}
    assert overlap.chained(SimpleNamespace(arg_names=("x",))) == {}


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_structures_are_those_of_the_header(tmp_path):
    (tmp_path / "sizes.cpp").write_text(PROGRAM)
    command = ["c++", f"-I{INCLUDE}", str(tmp_path / "sizes.cpp"), "-o", str(tmp_path / "sizes")]
    subprocess.run(command, check=True)
    found = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True)
    config, attribute, number = json.loads(found.stdout)
    ours = launch.Launch
    places = [ours.shared_memory.offset, ours.stream.offset, ours.attributes.offset]
    assert [sizeof(ours), *places] == config
    assert [sizeof(launch.Attribute), launch.Attribute.value.offset] == attribute
    assert (launch._OVERLAP.id, launch._OVERLAP.value) == (number, 1)
    assert ours.number.offset == ours.attributes.offset + 8
