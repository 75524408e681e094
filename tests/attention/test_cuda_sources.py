"""The CUDA kernels compile, for every kind of call, with the flags that PyTorch compiles them by.

A CPU cannot run them; what they compute is tested on a GPU. Later processes find them compiled.
"""

from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.cuda._utils import _get_gpu_rtc_compatible_flags as flags_of_pytorch

import dape
from dape.attention.fused import operator, passes
from dape.attention.fused.cuda import features, forward, launch, mix, taps

pytestmark = pytest.mark.unhooked  # tables come from a kernel, by the interpreter
nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
# The machine code is thrown away, and need not be fast. PTX is assembled all the same.
FAST = "--Ofast-compile=max"
HEADERS = Path(find_spec("nvidia").submodule_search_locations[0], "cu13", "include")
KINDS = {
    "causal": {},
    "padded": {"masked": True},
    "bidirectional": {"causal": False},
    "odd sizes in fp16": {"heads": 5, "hidden": 7, "head_dim": 48, "dtype": torch.float16},
    "many heads": {"heads": 25, "masked": True},
    "many units": {"hidden": 64},
    "wide": {"heads": 16, "hidden": 32, "head_dim": 128, "causal": False, "masked": True},
}


def problem(heads=12, hidden=32, head_dim=64, dtype=torch.bfloat16, causal=True, masked=False):
    query = torch.zeros(1, heads, 64, head_dim, dtype=dtype)
    bias, adapter = dape.Kerple(heads), dape.DAPE(heads, hidden=hidden)
    tables = operator.tables(bias, adapter, heads, 64, query.device)
    mask = torch.ones(1, 64, dtype=torch.bool) if masked else None
    return operator.problem_of(query, query, query, tables, mask, 1.0, causal, 0)


def refusal(source, capability):
    """Return what the compiler says of a source that it refuses, or nothing."""
    options = [f"--gpu-architecture=sm_{capability}", f"-I{HEADERS}", *flags_of_pytorch(), FAST]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if result == nvrtc.nvrtcResult.NVRTC_SUCCESS:
        return ""
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.decode()


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("name", ["mix", "mix_backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_across_heads_compile(kind, name, capability):
    given = problem(**KINDS[kind])
    source = mix.source(name, *passes.mixer_of(given, "cuda").macros())
    assert refusal(source, capability) == ""


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("name", taps.RESIDENT)
@pytest.mark.parametrize(("heads", "hidden"), [(12, 32), (5, 7)])
def test_the_kernels_with_taps_compile(heads, hidden, name, capability):
    query = torch.zeros(1, heads, 64, 64, dtype=torch.bfloat16)
    adapter = dape.DAPE(heads, hidden, kernel_size=3)
    tables = operator.tables(dape.Kerple(heads), adapter, heads, 64, query.device)
    given = operator.problem_of(query, query, query, tables, None, 1.0, True, 0)
    source = taps.source(name, *taps.CudaTapsMixer(given, given.terms, given.terms.static).macros())
    assert refusal(source, capability) == ""


@pytest.mark.parametrize("name", ["pieces", "pieces_backward", "features_mix", "features_backward"])
@pytest.mark.parametrize(
    "sizes", [(12, 32, 32, 32, 32, 0), (5, 7, 3, 16, 16, 1), (16, 0, 20, 16, 32, 1)]
)
def test_the_kernels_of_fire_compile(sizes, name):
    assert refusal(features.source(name, *sizes), "90") == ""


@pytest.mark.parametrize(
    ("name", "exact"), [*product(["forward"], [False, True]), ("pack_tables", False)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_forward_pass_compiles(kind, name, exact):
    given = problem(**KINDS[kind])
    heads, head_dim, units = (
        given.query.shape[1],
        given.query.shape[3],
        forward.padded_units(given.terms),
    )
    where = forward.layout(heads, head_dim, units)
    if where is None:
        assert kind in ("wide", "many heads")
        return
    source = forward.source(name, *forward.macros(given, given.terms, where, exact))
    assert refusal(source, "90a") == ""


def test_the_compiler_refuses_what_pytorch_would():
    assert "no suitable conversion" in refusal(
        "#include <cuda_fp16.h>\n__global__ void x(float* a, __half b) { *a = (float)b; }", "90"
    )


def test_the_compiler_refuses_what_the_assembler_would():
    source = '__global__ void x(int* a) {{ asm volatile("{}.{};" : "=r"(*a)); }}'
    assert "ptxas" in refusal(source.format("mov", "u23 %0, 1"), "90")
    assert refusal(source.format("mov", "u32 %0, 1"), "90") == ""


def test_a_kernel_is_compiled_once_and_read_from_the_cache_by_later_processes(
    monkeypatch, tmp_path
):
    given = []

    def compiler(*words):
        given.append(words)
        return f"code of {words}".encode(), words[1]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch._utils, "_nvrtc_compile", compiler)
    calls = [("a", "mix", "90"), ("b", "mix", "90"), ("a", "mix", "90a"), ("a", "other", "90")]
    first = [launch.compiled(*call) for call in calls]
    assert first == [f"code of {call}".encode() for call in calls]
    assert [launch.compiled(*call) for call in calls] == first and given == calls
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    assert launch.compiled(*calls[0]) == first[0] and given == [*calls, calls[0]]
