"""Random calls of attention against float64: how many are off, not finite, crash or are refused.

    python benchmarks/random_calls.py [--calls 320] [--seed 0] [--device cuda] [--workers 8]
        [--minutes 60]

Kernels are compiled for each set of sizes, so a run draws a few sets (`Shape`), each of which many
calls share. What a call draws beside it (lengths, offsets, masks, documents, parts of the keys, the
layout in memory, the bias and its size, the size of the scores, the backend) costs no compilation.
Forward, and gradients of queries, keys, values and every parameter. Then come long calls: every
bias at 524,288 and 1,048,576 keys, and tensors of more than 2^31 numbers.

An error is the Euclidean norm of the difference from float64. A tensor is off if its error is more
than 4 times the yardstick, and some digits of the dtype. The yardstick is the error of the textbook
in float32, which rounds to the dtype of the call what PyTorch's own kernels round: weights, output,
and the gradient of the logits.

- An adapter of a 16-bit call sees scores that are rounded to fp16. PyTorch has no such step. The
  gradient of a LeakyReLU jumps, and rounded scores turn the hidden units that are nearest to zero,
  whoever rounds; queries and keys in 16 bits have moved the scores as far before. Layers, tables
  and dP, which the kernels round too, are not rounded in the textbook.
- The error of a sum of few numbers may be near zero by chance. The yardstick is therefore the root
  of the mean square over three draws of queries, keys, values and mask.

Exits with 1 if a tensor is off or not finite, or if a call crashes.
"""

import argparse
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import TimeoutError, get_context

import torch
from drawn_calls import GPU_BACKENDS, draw_call, draw_shape, long_calls
from judged_calls import Verdict, judge, judge_long


def run_shape(
    number: int, *, count: int, seed: int, device: str, backends: tuple[str, ...]
) -> list[Verdict]:
    """Return the verdicts on the calls of a shape, in a process of its own."""
    torch.set_num_threads(1)
    chance = random.Random(1000 * seed + number)
    shape = draw_shape(chance, device, number)
    return [judge(draw_call(chance, shape, device, backends), device) for _ in range(count)]


def run_long(number: int, *, device: str) -> list[Verdict]:
    """Return the verdict on a long call, in a process of its own: the next has its memory."""
    return [judge_long(list(long_calls())[number], device)]


def spread(
    task: Callable[[int], list[Verdict]], number: int, workers: int, minutes: float
) -> Iterator[list[Verdict]]:
    """Yield the verdicts of each task as it is done, until the minutes are over."""
    if not workers:
        yield from map(task, range(number))
        return
    end = time.monotonic() + 60 * minutes
    with get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        found = pool.imap_unordered(task, range(number))
        for done in range(number):
            try:
                yield found.next(timeout=max(0.0, end - time.monotonic()))
            except TimeoutError:
                print(f"{minutes:g} minutes are over: {number - done} of {number} were not tried")
                return


def collected(
    name: str, task: Callable[[int], list[Verdict]], number: int, workers: int, minutes: float
) -> list[Verdict]:
    """Return the verdicts of all tasks, and print a line for each as it is done."""
    verdicts: list[Verdict] = []
    begun = time.perf_counter()
    for done, found in enumerate(spread(task, number, workers, minutes), 1):
        verdicts += found
        wrong = sum(verdict.outcome not in ("right", "refused") for verdict in found)
        counts = f"{name} {done} of {number}: {len(found)} calls, {wrong} wrong"
        print(f"{counts}, {time.perf_counter() - begun:.0f} s", flush=True)
    return verdicts


def report(verdicts: list[Verdict], seed: int, seconds: float) -> bool:
    """Print a line for each kind, and for each call that is not right; return whether all are."""
    kinds: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        kinds[verdict.call.kind].append(verdict)
    names = ("right", "off", "not finite", "crashed", "refused")
    print(f"{'kind':24}" + "".join(f"{name:>12}" for name in names) + f"{'worst':>9}")
    for kind, those in [*sorted(kinds.items()), ("all", verdicts)]:
        counts = Counter(verdict.outcome for verdict in those)
        worst = max((verdict.ratio for verdict in those), default=0.0)
        print(f"{kind:24}" + "".join(f"{counts[name]:12}" for name in names) + f"{worst:9.2f}")
    for verdict in verdicts:
        if verdict.outcome in ("off", "not finite", "crashed"):
            print(f"\n{verdict.outcome}: {verdict.detail}, {verdict.ratio:.3g}\n  {verdict.call}")
    reasons = Counter(v.detail.partition(": ")[2][:70] for v in verdicts if v.outcome == "refused")
    for reason, count in reasons.most_common():
        print(f"refused {count:3}: {reason}")
    print(f"seed {seed}, {len(verdicts)} calls, {seconds:.0f} s")
    return all(verdict.outcome in ("right", "refused") for verdict in verdicts)


def main(arguments: list[str] | None = None) -> int:
    """Run as many calls as asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--calls", type=int, default=320 if cuda else 10)
    parser.add_argument("--shapes", type=int, default=32 if cuda else 10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--workers", type=int, default=8 if cuda else 0, help="0: this process")
    parser.add_argument(
        "--minutes", type=float, default=60, help="limit of the random, and of the long calls"
    )
    parser.add_argument("--backends", nargs="+", default=None)
    parser.add_argument("--long", action=argparse.BooleanOptionalAction, default=cuda)
    given = parser.parse_args(arguments)
    backends = tuple(given.backends or (GPU_BACKENDS if given.device == "cuda" else ("chunked",)))
    begun, each = time.perf_counter(), -(-given.calls // given.shapes)
    task = partial(run_shape, count=each, seed=given.seed, device=given.device, backends=backends)
    shapes = given.shapes if each else 0
    verdicts = collected("shape", task, shapes, given.workers, given.minutes)
    right = report(verdicts, given.seed, time.perf_counter() - begun)
    if given.long:
        print("\n512 queries against 524,288 and 1,048,576 keys, and more than 2^31 numbers")
        begun, number = time.perf_counter(), len(list(long_calls()))
        task = partial(run_long, device=given.device)
        verdicts = collected("long", task, number, min(1, given.workers), given.minutes)
        right &= report(verdicts, 0, time.perf_counter() - begun)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
