"""The backward pass across heads as one kernel, beside the kernels it stands for, on one GPU.

    timeout 150 python benchmarks/backward.py [check time others spans variants]

`check` compares the gradients of both ways with float64 and says whether two passes of the kernel
agree bit for bit; `others` does so for other kinds of calls. `time` has DAPE-Kerple, forward and
backward, inside CUDA graphs and kernel by kernel, bf16, causal, 12 heads of 64, 32 hidden units.
`spans` tries how many tiles of keys a block has, `variants` other layouts of the kernel. Prints a
line as soon as it is known, and first what is about to start.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch
from bars import DEVICE, case, ours, plain, timed
from tiles import milliseconds, problem, run
from torch import Tensor

import dape
from dape.attention.fused import geometry
from dape.attention.fused.cuda import backward
from dape.bench.case import TRAINING, Parts, build, draw, step

SHAPES = ((1, 8192), (4, 2048), (32, 512))
WAYS = {"one kernel": True, "several": False}
SPANS = [(5, 16), (5, 8), (3, 16), (8, 16), (2, 32)]  # blocks a multiprocessor, tiles at least
SINGLE = {
    "constexpr int PAIRS = UNITS <= 32 && SHARERS == 1 ? 2 : 1;": "constexpr int PAIRS = 1;",
    "never[2 * PAIRS * HEADS]": "never[4 * HEADS]",
}


def kind(rows: int, mixers: int, head_registers: int, mixer_registers: int) -> dict[str, int]:
    """Return a layout for 12 heads of 64 with 32 units."""
    shared_memory = backward.shared_memory(12, 64, 32, rows, mixers, 0)
    return dict(
        rows=rows, mixers=mixers, one_stage=0, head_registers=head_registers,
        mixer_registers=mixer_registers, shared_memory=shared_memory,
    )  # fmt: skip


VARIANTS = {
    "as it is": ({}, {}),
    "16 rows, 8 mixers, 64 and 144 registers": (kind(16, 8, 64, 144), {}),
    "16 rows, 8 mixers, 48 and 160 registers": (kind(16, 8, 48, 160), {}),
    "16 rows, 4 mixers, a pair at a time": (kind(16, 4, 72, 240), SINGLE),
    "32 rows, 4 mixers, a pair at a time": (kind(32, 4, 96, 224), SINGLE),
    "32 rows, 4 mixers": (kind(32, 4, 96, 224), {}),
}
BEGUN = perf_counter()


@dataclass(frozen=True, slots=True)
class Call:
    """Sizes of a call whose gradients are checked."""

    heads: int = 12
    kv_heads: int = 12
    head_dim: int = 64
    hidden: int = 32
    batch: int = 2
    rows: int = 1000
    keys: int = 1000
    causal: bool = True
    offset: int = 0
    masked: bool = False
    dtype: torch.dtype = torch.bfloat16


CALLS = {
    "12 heads of 64": Call(),
    "the same, in several bands": Call(rows=1030, keys=1030),
}
OTHERS = {
    "bidirectional, padding": Call(causal=False, masked=True, rows=333, keys=517),
    "5 heads on 1, offset, fp16": Call(5, 1, 64, 7, 3, 201, 333, True, 132, dtype=torch.float16),
    "16 heads of 64": Call(heads=16, kv_heads=4, rows=700, keys=700, masked=True),
    "8 heads of 128": Call(heads=8, kv_heads=8, head_dim=128, rows=600, keys=600),
    "12 heads of 48, 64 units": Call(head_dim=48, hidden=64, rows=500, keys=500),
}


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"{perf_counter() - BEGUN:6.1f} s  {text}", flush=True)


@contextmanager
def way(whole: bool, bands: bool = False) -> Iterator[None]:
    """Let the backward pass be one kernel, or several; with small bands, if asked."""
    layout_of, scores = backward.layout_of, geometry.SCORES_PER_BAND
    if not whole:
        backward.layout_of = lambda problem, terms: None
    if bands:
        geometry.SCORES_PER_BAND = 12 * 2**17
    try:
        yield
    finally:
        backward.layout_of, geometry.SCORES_PER_BAND = layout_of, scores


def gradients(call: Call, given: list[Tensor], parts: Parts, dtype: torch.dtype, backend: str):
    """Return the gradients of query, key, value and the parameters by a backend."""
    *qkv, cotangent, mask = given
    parts = Parts(
        *(copy.deepcopy(part).to(torch.promote_types(dtype, torch.float32)) for part in parts)
    )
    leaves = [x.to(dtype).requires_grad_() for x in qkv]
    out = dape.attention(
        *leaves, parts.bias, parts.adapter, mask=mask if call.masked else None, causal=call.causal,
        query_offset=call.offset, backend=backend,
    )  # fmt: skip
    named = {n: p for n, p in parts.named_parameters.items() if not n.endswith("bias_out")}
    names = ["query", "key", "value", *named]
    found = torch.autograd.grad(out, [*leaves, *named.values()], cotangent.to(dtype))
    return dict(zip(names, found, strict=True))


def drawn(call: Call) -> tuple[list[Tensor], Parts]:
    """Return query, key, value, the gradient of the output and a mask; and the modules."""
    torch.manual_seed(0)
    sizes = [(call.heads, call.rows), (call.kv_heads, call.keys), (call.kv_heads, call.keys)]
    sizes.append(sizes[0])
    given = [
        torch.randn(call.batch, *n, call.head_dim, device=DEVICE).to(call.dtype) for n in sizes
    ]
    first = torch.randint(0, call.keys // 2, (call.batch, 1), device=DEVICE)
    given.append((torch.arange(call.keys, device=DEVICE) >= first)[:, None, None])
    parts = Parts(dape.Kerple(call.heads), dape.DAPE(call.heads, call.hidden))
    for parameter in parts.named_parameters.values():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return given, Parts(*(part.to(DEVICE) for part in parts))


def check() -> None:
    """Compare both ways with float64 where heads and widths are those of `time`."""
    compare(CALLS)


def others() -> None:
    """Compare both ways with float64 for other kinds of calls."""
    compare(OTHERS)


def compare(calls: dict[str, Call]) -> None:
    """Compare both ways with float64, and two passes of the kernel with each other."""
    for name, call in calls.items():
        given, parts = drawn(call)
        solve = partial(gradients, call, given, parts, call.dtype, "cuda")
        exact = gradients(call, given, parts, torch.float64, "reference")
        found = {}
        for text, whole in WAYS.items():
            say(f"{name}: {text} starts")
            with way(whole, "bands" in name):
                found[text] = solve()
                torch.cuda.synchronize()
                if whole:
                    again = solve()
                    equal = all(torch.equal(again[n], x) for n, x in found[text].items())
        for tensor, true in exact.items():
            mine, theirs = (
                ((f[tensor].double() - true).norm() / true.norm()).item() for f in found.values()
            )
            verdict = "good" if mine <= 1.5 * theirs + 1e-4 else "WRONG"
            say(f"{name}: {tensor:24} {mine:.2e}, several kernels {theirs:.2e}  {verdict}")
        say(f"{name}: two passes {'agree bit for bit' if equal else 'DIFFER'}")


def time() -> None:
    """Time forward and backward inside CUDA graphs, and each kernel."""
    for batch, length in SHAPES:
        given = case("dape-kerple", batch, length)
        parts = build(given)
        yardstick = timed(plain, replace(given, scheme="nope"), Parts(), TRAINING).median
        say(f"{batch}x{length} SDPA {yardstick:.3f} ms")
        inputs = draw(given, 1)[0]
        found = []
        for text, whole in WAYS.items():
            say(f"{batch}x{length} {text} starts")
            with way(whole):
                attend = ours(parts, "cuda")
                found.append([x.detach() for x in step(attend, inputs, parts, TRAINING)])
                took = timed(attend, given, parts, TRAINING)
                say(
                    f"{batch}x{length} {text}: {took.median:.3f} ms, {took.median / yardstick:.2f} "
                    f"times SDPA, eager {took.eager}, {took.launches} launches, "
                    f"peak {(took.peak or 0) / 2**20:.0f} MiB"
                )
                kernels = milliseconds(partial(step, attend, inputs, parts, TRAINING))
                for kernel in sorted(kernels, key=kernels.__getitem__)[:-13:-1]:
                    say(f"{batch}x{length} {text}: {kernels[kernel]:.3f} ms {kernel[:60]}")
        names = ["output", "query", "key", "value", *parts.named_parameters]
        for name, mine, theirs in zip(names, *found, strict=True):
            off = ((mine.double() - theirs.double()).norm() / theirs.double().norm()).item()
            say(f"{batch}x{length} {name}: the two ways differ by {off:.1e}")


def spans() -> None:
    """Time the kernel for several numbers of blocks and of tiles that a block has at least."""
    for shape in SHAPES:
        given = problem(*shape, dape.DAPE(12).cuda())
        for tried in SPANS:
            backward.SHARE, backward.LEAST = tried
            found = milliseconds(run(given))
            sums = next(value for name, value in found.items() if "distances_kernel" in name)
            say(f"{shape} {tried}: backward {found['backward']:.3f} ms, distances {sums:.3f}")


@contextmanager
def variant(layout: dict[str, int], texts: dict[str, str]) -> Iterator[None]:
    """Let the kernel have another layout, and some texts of its source be others."""
    layout_of, source = backward.layout_of, backward.source

    def changed(name: str, *values: int) -> str:
        text = source(name, *values)
        for old, new in texts.items():
            assert old in text
            text = text.replace(old, new)
        return text

    backward.layout_of = lambda *given: layout_of(*given)._replace(**layout)
    backward.source = changed
    backward.compiled.cache_clear()
    try:
        yield
    finally:
        backward.layout_of, backward.source = layout_of, source
        backward.compiled.cache_clear()


def variants() -> None:
    """Time the kernel in other layouts at 1 x 8192."""
    given = problem(1, 8192, dape.DAPE(12).cuda())
    for name, changes in VARIANTS.items():
        say(f"{name} starts")
        with variant(*changes):
            say(f"{name}: backward {milliseconds(run(given))['backward']:.3f} ms")


PARTS = {f.__name__: f for f in (check, time, others, spans, variants)}


def main() -> None:
    """Run what is named, or everything."""
    unknown = [name for name in sys.argv[1:] if name not in PARTS]
    if unknown:
        sys.exit(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
