"""The time of each kernel of bands and of the static design, for candidates of its tile.

    python benchmarks/tiles.py [static table bands mix scratch]

On one GPU, at the paper's 125M shape (12 heads of 64, 32 hidden units), bf16, causal, forward and
backward once with each candidate; milliseconds of the kernel by PyTorch's profiler. What `TILES` in
`static.py` and `bands.py` say, and the constants of `cuda/mix.py`, are the fastest of these.
"""

import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from types import ModuleType

import torch

import dape
from dape.attention.fused import bands, geometry, operator, passes, static
from dape.attention.fused.cuda import mix
from dape.attention.fused.problem import Problem
from dape.attention.fused.sizes import Tile

SHAPES = ((1, 8192), (32, 512))
ONE_HEAD = [(64, 64, 4, n) for n in (2, 3, 4)] + [(128, 64, 8, 3), (64, 128, 8, 2), (64, 128, 4, 3)]
STATIC = dict.fromkeys(("forward", "grad_query", "grad_key_value"), ONE_HEAD)
TABLE = {"grad_table": [(64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 3)]}
BANDS = dict.fromkeys(("softmax_value", "grad"), ONE_HEAD) | {
    "scores": [
        *((64, 128, 4, 2), (64, 128, 4, 3), (64, 64, 4, 2)),
        *((64, 64, 4, 3), (128, 128, 8, 2), (128, 64, 4, 2)),
    ]
}
# Blocks of a launch, and blocks that a multiprocessor holds.
MIX = [(512, 2), (1024, 2), (2048, 2), (4096, 2), (1024, 3)]
# Scores that stand in the scratch.
SCRATCHES = [2**25, 2**26, 2**27, 2**28]


def problem(
    batch: int,
    length: int,
    adapter: torch.nn.Module | None,
    bias: type[torch.nn.Module] = dape.Kerple,
) -> Problem:
    """Return a problem of that shape with random inputs."""
    query, key, value = (
        torch.randn(batch, 12, length, 64, device="cuda").bfloat16() for _ in range(3)
    )
    found = operator.tables(bias(12).cuda(), adapter, 12, length, query.device)
    tables = [table.detach() for table in found]
    return operator.problem_of(query, key, value, tables, None, 0.125, True, 0)


def milliseconds(run: Callable[[], object], calls: int = 4) -> dict[str, float]:
    """Return the time that a run spends in each kernel, by the kernel's name."""
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as found:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / calls / 1000 for event in found.key_averages()}


def run(given: Problem) -> Callable[[], object]:
    """Return a forward and a backward pass; `softmax_value` runs in the forward of Triton."""
    found = passes.forward(given, "cuda", True)
    grad_out = torch.randn_like(found.out)

    def both() -> None:
        passes.forward(given, "triton", False)
        passes.backward(given, "cuda", found, grad_out, None, True)

    return both


def tiles(
    module: ModuleType,
    candidates: dict[str, list[tuple[int, ...]]],
    bias: type[torch.nn.Module] = dape.Kerple,
) -> Iterator[str]:
    """Yield a line for each kernel, shape and candidate of a module's `TILES`."""
    adapter = None if module is static else dape.DAPE(12).cuda()
    kept = dict(module.TILES)
    for shape in SHAPES:
        given = problem(*shape, adapter, bias)
        for row in zip_longest(*candidates.values()):
            chosen = {k: Tile(*each) for k, each in zip(candidates, row, strict=True) if each}
            module.TILES.update(chosen)
            found = milliseconds(run(given))
            for kernel, tile in chosen.items():
                yield f"{kernel:16} {shape!s:12} {tuple(tile)!s:18} {found[f'{kernel}_kernel']:.3f}"
    module.TILES.update(kept)


def blocks() -> Iterator[str]:
    """Yield a line for each shape and candidate of the backward kernel across heads."""
    for shape in SHAPES:
        given = problem(*shape, dape.DAPE(12).cuda())
        for tried in MIX:
            mix.BLOCKS, mix.RESIDENT = tried
            mix.compiled_on.cache_clear()
            found = milliseconds(run(given))
            yield f"mix_backward {shape!s:12} {tried!s:12} {found['mix_backward']:.3f}"


def scratch() -> Iterator[str]:
    """Yield a line for each shape and size of the scratch: all kernels of both passes together."""
    for shape in (*SHAPES, (1, 32768)):
        given = problem(*shape, dape.DAPE(12).cuda())
        for scores in SCRATCHES:
            geometry.SCORES_PER_BAND = scores
            found = sum(milliseconds(run(given)).values())
            yield f"all kernels {shape!s:12} 2^{scores.bit_length() - 1} scores {found:.3f}"


PARTS = {
    "static": lambda: tiles(static, STATIC),
    "table": lambda: tiles(static, TABLE, dape.T5),
    "bands": lambda: tiles(bands, BANDS),
    "mix": blocks,
    "scratch": scratch,
}


def main() -> None:
    """Print what is named, or everything."""
    unknown = [name for name in sys.argv[1:] if name not in PARTS]
    if unknown:
        sys.exit(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    for name in sys.argv[1:] or PARTS:
        for line in PARTS[name]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
