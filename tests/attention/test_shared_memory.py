"""Kernels compile for a GPU that need not be there, and fit its shared memory.

The interpreter of Triton knows no bfloat16, and mixes dtypes that a compiler refuses.
"""

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
    {"heads": 12, "kv_heads": 12, "head_dim": 64, "hidden": 32, "rows": 1, "bias": "FIRE"},
    {"heads": 32, "kv_heads": 8, "head_dim": 128, "hidden": 64, "rows": 2, "bias": "FIRE"},
]

STEP = {"heads": 12, "kv_heads": 12, "head_dim": 64, "hidden": 32, "rows": 1, "gradients": False}
# Eight warps for 64 hidden units, and rows that begin anywhere: see `decode.tile_of`.
WRONG = {"heads": 12, "kv_heads": 12, "head_dim": 64, "hidden": 64, "rows": 151, "keys": 451}
ANYWHERE = [WRONG | {"dtype": "bfloat16", "bias": "T5", "cut": cut} for cut in (True, False)]
DECODING = [*CALLS, STEP, STEP | {"bias": "T5"}]
MAPS = [
    {"heads": 8, "kv_heads": 8, "head_dim": 8, "hidden": 64, "mapped": True, "taps": taps}
    for taps in (1, 3)
]
KERNELS = {  # a kernel of a call of a bias, hidden units and taps
    ("Kerple", 32, 1): "mix_backward_kernel",
    ("T5", 32, 1): "table_sums_kernel",
    ("FIRE", 32, 1): "fire_mix_backward_kernel",
    ("Kerple", 32, 3): "convolution_mix_kernel",
    ("Kerple", 0, 1): "sum_kernel",
    ("T5", 0, 1): "grad_table_kernel",
}
IN_BFLOAT16 = [
    {"heads": 12, "kv_heads": 4, "head_dim": 64, "dtype": "bfloat16"}
    | dict(zip(("bias", "hidden", "taps"), call, strict=True))
    for call in KERNELS
]
BANDS = {
    "heads": 2, "kv_heads": 2, "head_dim": 64, "hidden": 32, "rows": 260, "keys": 260,
    "dtype": "bfloat16", "room": 2 * 64 * 64, "kernels": ["grad_kernel"],
}  # fmt: skip

MERGED = [  # a row in parts, and many rows
    STEP | {"rows": rows, "keys": 1024, "hidden": 0, "kernels": ["combine_kernel"]}
    for rows in (1, 512)
]


@pytest.fixture(scope="module")
def compiled():
    """Return the shared memory of kernels by name for each of some calls, compiled for Hopper.

    A process compiles them all. A call that sets gradients or the room of bands holds for itself.
    """
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    decoding, anywhere = (
        [each | {"kernels": ["decode_kernel"], "most_bands": 0} for each in part]
        for part in (DECODING, ANYWHERE)
    )
    parts = {
        "decoding": decoding, "anywhere": anywhere, "maps": MAPS, "bfloat16": IN_BFLOAT16,
        "bands": [BANDS], "merged": MERGED,
        "rows": [STEP | {"taps": 3, "kernels": ["rows_mix_kernel"]}],
    }  # fmt: skip
    command = [
        sys.executable,
        str(SCRIPT),
        *(json.dumps(each) for part in parts.values() for each in part),
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    lines = map(json.loads, run.stdout.splitlines())
    return {name: [next(lines) for _ in part] for name, part in parts.items()}


def test_the_kernel_of_all_heads_fits_a_hopper_gpu(compiled):
    sizes = [size for each in compiled["decoding"] for size in each["decode_kernel"]]
    assert len(sizes) == len(DECODING)
    assert all(0 < size <= HOPPER // 2 for size in sizes)  # two programs on a multiprocessor


def test_the_machine_code_of_decoding_multiplies_what_its_ptx_names(compiled):
    """`compiled.py` compares both for every kernel; these were wrong."""
    assert [len(each["decode_kernel"]) for each in compiled["anywhere"]] == [1, 1]


def test_the_kernel_of_a_step_with_taps_fits_smaller_gpus(compiled):
    (found,) = compiled["rows"]
    (size,) = found["rows_mix_kernel"]
    assert 0 < size <= 99 * 1024


def test_spans_merge_in_little_shared_memory(compiled):
    for found in compiled["merged"]:
        (size,) = found["combine_kernel"]
        assert 0 < size <= 16 * 1024


def test_the_map_across_heads_fits_smaller_gpus(compiled):
    for found in compiled["maps"]:
        assert set(found) == {"heads_kernel", "heads_backward_kernel"}
        assert all(0 < size <= 99 * 1024 for each in found.values() for size in each)


@pytest.mark.parametrize("call", KERNELS)
def test_every_kernel_of_a_call_in_bfloat16_compiles(call, compiled):
    found = dict(zip(KERNELS, compiled["bfloat16"], strict=True))[call]
    assert KERNELS[call] in found
    assert all(size <= HOPPER for each in found.values() for size in each)


def test_so_do_kernels_that_add_up_bands(compiled):
    (found,) = compiled["bands"]
    assert len(found["grad_kernel"]) > 1 and max(found["grad_kernel"]) <= HOPPER


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
