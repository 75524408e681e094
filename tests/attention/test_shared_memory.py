"""Kernels fit the shared memory of a GPU, also where all heads share one key head."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dape

SCRIPT = Path(__file__).with_name("compiled.py")
HOPPER = 227 * 1024
CALLS = [
    {"heads": 5, "kv_heads": 1, "head_dim": 128, "hidden": 48},
    {"heads": 1, "kv_heads": 1, "head_dim": 80, "hidden": 32},
    {"heads": 12, "kv_heads": 12, "head_dim": 64, "hidden": 32, "rows": 1},
]

STEP = {"heads": 12, "kv_heads": 12, "head_dim": 64, "hidden": 32, "rows": 1, "gradients": False}


def compiled(name, calls):
    """Return the shared memory of the kernels of a name in each call, compiled for Hopper."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), name, *map(json.dumps, calls)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_the_kernel_of_all_heads_fits_a_hopper_gpu():
    calls = [*CALLS, STEP, STEP | {"bias": "T5"}]
    found = compiled("decode_kernel", calls)
    assert len(found) == len(calls) and all(len(each) == 1 for each in found)
    assert all(0 < size <= HOPPER // 2 for (size,) in found)  # two programs on a multiprocessor


@pytest.mark.parametrize("name", ["tables_kernel", "tables_backward_kernel", "table_sums_kernel"])
def test_the_kernels_of_t5_s_tables_compile(name):
    assert [len(each) for each in compiled(name, [CALLS[2] | {"bias": "T5", "rows": 40}])] == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS[:2])
def test_on_a_gpu_one_key_head_is_as_in_chunks(call):
    heads, size = call["heads"], call["head_dim"]
    parts = dape.Kerple(heads).cuda(), dape.DAPE(heads, call["hidden"]).cuda()
    given = [
        torch.randn(2, n, 300, size, device="cuda").bfloat16().requires_grad_()
        for n in (heads, 1, 1)
    ]
    outputs = [dape.attention(*given, *parts, backend=name) for name in ("auto", "chunked")]
    ours, theirs = (torch.autograd.grad(out.float().square().sum(), given) for out in outputs)
    for mine, other in zip([outputs[0], *ours], [outputs[1], *theirs], strict=True):
        assert (mine - other).float().norm() < 0.02 * other.float().norm()
