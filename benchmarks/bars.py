"""The bars of fused attention, on one GPU, in one process, as ratios to PyTorch's own attention.

    python benchmarks/bars.py [attention wide biases decode heads memory errors training ...]

DAPE-Kerple, V1 and V2, and Kerple with learnable parameters at the paper's 125M shape (12 heads of
64, 32 hidden units), bf16, causal, and DAPE-FIRE. Short calls are timed inside a CUDA graph,
medians over rotating inputs (`dape.bench.clock`); beside it stand the eager call's wall clock and
how many kernels it starts. Prints a line for each measurement as it comes, and writes them to
`--out` as JSON with what they were measured on.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dape
from dape.bench import parity
from dape.bench.case import FORWARD, TRAINING, Case, Inputs, Parts, build, draw, sets, step
from dape.bench.clock import Timing, measure
from dape.files import check_writable, write_json
from dape.provenance import provenance
from dape.train import measure as train
from dape.train.recipe import Recipe, override, read

DEVICE = torch.device("cuda")
SCHEMES = {"dape": "dape-kerple", "static": "kerple", "v2": "dape3-kerple", "fire": "dape-fire"}
# A factor of the queries that takes some scores beyond 64, as a trained model may have them.
WIDE = 16.0


@dataclass(frozen=True, slots=True)
class Result:
    """One measurement: ours and the yardstick in milliseconds, or another unit, and their ratio.

    `eager` is the wall clock of a call outside a graph in milliseconds, `launches` what it starts.
    `clock` says how the time was taken, where that is known.
    """

    what: str
    ours: float
    yardstick: float | None = None
    unit: str = "ms"
    eager: float | None = None
    launches: int | None = None
    clock: str = ""

    @property
    def ratio(self) -> float | None:
        """Return ours over the yardstick."""
        return None if self.yardstick is None else self.ours / self.yardstick


def case(scheme: str, batch: int, length: int) -> Case:
    """Return a case of the 125M shape in bf16."""
    return Case(scheme, 12, 64, length, batch, "bf16", DEVICE, 0)


def drawn(given: Case, count: int, factor: float) -> list[Inputs]:
    """Return sets of inputs, with queries times a factor."""
    return [
        each._replace(query=(factor * each.query.detach()).requires_grad_())
        for each in draw(given, count)
    ]


def timed(
    attend: Callable[..., Tensor], given: Case, parts: Parts, direction: str, factor: float = 1.0
) -> Timing:
    """Return the timing of a call, with queries times a factor."""
    every = drawn(given, sets(given), factor)
    return measure([partial(step, attend, each, parts, direction) for each in every], DEVICE)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return what ratios are to."""
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def ours(parts: Parts, backend: str) -> Callable[..., Tensor]:
    """Return a backend of `dape.attention` with some parts."""
    return partial(dape.attention, bias=parts.bias, adapter=parts.adapter, backend=backend)


def attention() -> Iterator[Result]:
    """Forward, and with backward, of all schemes; forward of Triton alone."""
    for batch, length in ((1, 8192), (4, 2048), (32, 512), (1, 64)):
        for direction in (FORWARD, TRAINING):
            yardstick = timed(plain, case("nope", batch, length), Parts(), direction).median
            also = [("dape", "triton")] if direction == FORWARD else []
            for name, backend in [*((name, "cuda") for name in SCHEMES), *also]:
                given = case(SCHEMES[name], batch, length)
                parts = build(given)
                found = timed(ours(parts, backend), given, parts, direction)
                what = f"{name} {backend} {batch}x{length} {direction}"
                yield Result(
                    what,
                    found.median,
                    yardstick,
                    eager=found.eager,
                    launches=found.launches,
                    clock=found.clock,
                )


def wide() -> Iterator[Result]:
    """Forward, and with backward, where scores beyond 64 take the wide way."""
    for batch, length in ((1, 8192), (4, 2048), (32, 512)):
        for direction in (FORWARD, TRAINING):
            yardstick = timed(plain, case("nope", batch, length), Parts(), direction, WIDE).median
            for name in ("dape", "v2", "fire"):
                given = case(SCHEMES[name], batch, length)
                parts = build(given)
                found = timed(ours(parts, "cuda"), given, parts, direction, WIDE)
                what = f"{name} cuda wide {batch}x{length} {direction}"
                yield Result(what, found.median, yardstick, clock=found.clock)


def biases() -> Iterator[Result]:
    """DAPE V2 behind Kerple, and behind ALiBi, whose bias at 8,192 tokens is -4,096."""
    for batch, length in ((1, 8192), (4, 2048), (32, 512)):
        for direction in (FORWARD, TRAINING):
            yardstick = timed(plain, case("nope", batch, length), Parts(), direction).median
            for scheme in ("dape3-kerple", "dape3-alibi"):
                given = case(scheme, batch, length)
                parts = build(given)
                found = timed(ours(parts, "cuda"), given, parts, direction)
                what = f"{scheme} cuda {batch}x{length} {direction}"
                yield Result(what, found.median, yardstick, clock=found.clock)


def decode() -> Iterator[Result]:
    """One query against 32,768 cached keys."""
    keys = 32768
    given = [
        [torch.randn(1, 12, n, 64, device=DEVICE).bfloat16() for n in (1, keys, keys)]
        for _ in range(4)
    ]
    yardstick = measure([partial(scaled_dot_product_attention, *qkv) for qkv in given], DEVICE)
    for name, scheme in SCHEMES.items():
        parts = build(case(scheme, 1, keys))
        attend = partial(ours(parts, "auto"), query_offset=keys - 1)
        for how, function in (("", attend), (", compiled", torch.compile(attend))):
            with torch.no_grad():
                found = measure([partial(function, *qkv) for qkv in given], DEVICE)
            yield Result(f"{name} decode {keys} keys{how}", found.median, yardstick.median)


def memory() -> Iterator[Result]:
    """Peak memory beyond the inputs, and time, of long sequences."""
    calls = (("dape", 131072, TRAINING), ("v2", 131072, TRAINING), ("dape", 1048576, FORWARD))
    for name, length, direction in calls:
        given = case(SCHEMES[name], 1, length)
        parts, inputs = build(given), draw(given, 1)[0]
        step(ours(parts, "auto"), inputs, parts, direction)  # kernels are compiled at the first
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        step(ours(parts, "auto"), inputs, parts, direction)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        yield Result(f"{name} {length} {direction} peak", peak, unit="GiB")
        yield Result(f"{name} {length} {direction} time", 1000 * seconds)


def errors() -> Iterator[Result]:
    """Relative Frobenius errors against float64, beside the textbook's in bf16."""
    for name, scheme in SCHEMES.items():
        given = case(scheme, 2, 1024)
        parts, inputs = build(given), draw(given, 1)[0]
        truth = parity.Truth.of(given, parts, inputs)
        found = truth.errors_of(ours(parts, "auto"), TRAINING)
        textbook = parity.errors(
            parity.by_rows(given, parts, inputs, torch.bfloat16), truth.tensors
        )
        for tensor, error in found.items():
            # A gradient that is zero but for rounding has an error, but none to compare with.
            zero = parity.vanishes(tensor, truth.tensors)
            yardstick = None if zero else textbook[tensor]
            yield Result(f"{name} error of {tensor}", error, yardstick, "relative")


def heads() -> Iterator[Result]:
    """Forward passes of more than 16 heads: milliseconds for a head, beside a head of 16."""
    for head_dim in (80, 128):
        times = {}
        for number in (16, 25, 32):
            given = replace(case(SCHEMES["dape"], 4, 2048), heads=number, head_dim=head_dim)
            parts = build(given)
            times[number] = timed(ours(parts, "cuda"), given, parts, FORWARD).median / number
            yield Result(f"dape {number} heads of {head_dim}, a head", times[number], times[16])


def training() -> Iterator[Result]:
    """Training of 125M on 32 x 512 by `hardware.compile`: thousands of tokens a second."""
    for how in ("none", "blocks", "graphs"):
        speeds: dict[str, float] = {}
        for scheme in ("nope", "dape-kerple", "dape3-kerple"):
            changes = {
                "model.scheme": scheme, "training.batch_size": 32, "hardware.compile": how,
            }  # fmt: skip
            torch._dynamo.reset()  # the compiler gives up after eight models
            recipe = override(read("recipes/125m.yaml", Recipe), changes)
            for found in train.measure(recipe, sizes=[32], steps=20, warm_up=5):
                speeds[scheme] = found.tokens_per_second / 1000
            yield Result(f"training {scheme} {how}", speeds[scheme], speeds["nope"], "ktok/s")


def profile() -> Iterator[Result]:
    """The time of every kernel of one forward and backward pass."""
    shapes = ((1, 8192, 1.0), (32, 512, 1.0), (32, 512, WIDE))
    profiled = [*product(("dape", "v2"), shapes), ("static", shapes[0]), ("fire", shapes[-1])]
    for name, (batch, length, factor) in profiled:
        given = case(SCHEMES[name], batch, length)
        parts, inputs = build(given), drawn(given, 1, factor)[0]
        for _ in range(3):
            step(ours(parts, "auto"), inputs, parts, TRAINING)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as found:
            for _ in range(5):
                step(ours(parts, "auto"), inputs, parts, TRAINING)
            torch.cuda.synchronize()
        averages = sorted(found.key_averages(), key=lambda e: -e.device_time_total)
        for event in averages[:14]:
            time_ms = event.device_time_total / 5000
            way = " wide" if factor > 1 else ""
            yield Result(f"{name}{way} {batch}x{length} {event.key[:60]}", time_ms)


PARTS = {
    f.__name__: f
    for f in (attention, wide, biases, decode, heads, memory, errors, training, profile)
}


def main() -> None:
    """Measure what is named, or everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/bars.json"))
    given = parser.parse_args()
    unknown = [name for name in given.parts if name not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.error("the bars need a CUDA GPU, and PyTorch sees none")
    check_writable(given.out)
    record = {"provenance": provenance(DEVICE), "results": []}
    for name in given.parts or PARTS:
        for result in PARTS[name]():
            line = f"{result.what:68} {result.ours:11.4g} {result.unit:8}"
            if result.ratio is not None:
                line += f"{result.ratio:8.2f} x"
            if result.eager is not None:
                line += f"  eager {result.eager:.3f} ms, {result.launches} launches"
            elif result.clock:
                line += f"  {result.clock}"
            print(line, flush=True)
            record["results"].append(asdict(result) | {"ratio": result.ratio})
            write_json(given.out, record)


if __name__ == "__main__":
    main()
