"""Random calls of attention against float64: how many are off, not finite, crash or are refused.

    python benchmarks/random_calls.py [--calls 320] [--seed 0] [--device cuda] [--workers 8]
        [--minutes 60]

Kernels are compiled for each set of sizes, so a run draws a few sets (`Shape`), each of which many
calls share. What a call draws beside it (lengths, offsets, padding, the bias and its size, the size
of the scores, the backend) costs no compilation. Forward, and gradients of queries, keys, values
and every parameter. Then come long calls: every bias at 524,288 and 1,048,576 keys.

An error is the Euclidean norm of the difference from float64. The yardstick is that of the textbook
with scores in float32, which rounds what PyTorch's own kernels round: weights, output, and the
gradient of the logits; with an adapter to bf16, as the scratch has no more digits in fp16. A tensor
is off if its error is more than 4 times the yardstick's, and some digits of the dtype. Exits with 1
if any is, or is not finite, or if a call crashes.
"""

import argparse
import copy
import math
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import TimeoutError, get_context
from typing import Any

import torch
from torch import Tensor, nn

import dape
from dape.attention.call import visibility, widened
from dape.errors import UserError
from dape.positions.adapter import Rows
from dape.positions.bias import Bias

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What an error may be beside the yardstick's, relative to the size of the tensor.
SLACK = {"bf16": 4e-3, "fp16": 2e-3, "fp32": 1e-4}
TIMES = 4.0
BIASES = {
    "alibi": dape.ALiBi,
    "kerple": dape.Kerple,
    "kerple-power": dape.KerplePower,
    "t5": dape.T5,
    "sandwich": dape.Sandwich,
    "fire": dape.FIRE,
}
TABLES = ("none", *(name for name in BIASES if name != "fire"))
FORMS = ("none", "concat", "sum", "bias", "scores", "no residual", "talking heads", "dape3")
GPU_BACKENDS = ("auto", "auto", "cuda", "triton", "chunked")


@dataclass(frozen=True, slots=True)
class Shape:
    """What kernels are compiled for."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    dtype: str
    form: str
    fire: bool
    causal: bool
    padded: bool


@dataclass(frozen=True, slots=True)
class Call:
    """One call: a shape, and what is drawn beside it."""

    shape: Shape
    backend: str
    bias: str
    batch: int
    rows: int
    keys: int
    offset: int
    scores: float  # added to queries, a quarter to keys: their product is near this squared
    level: float  # what the bias is times, or what is added to it
    seed: int

    @property
    def kind(self) -> str:
        """Return the line of the table that counts it."""
        return f"{self.shape.form}, {'fire' if self.shape.fire else 'table'}"


def draw_shape(chance: random.Random, device: str, number: int) -> Shape:
    """Return random sizes; forms take turns, so that each is there."""
    gpu = device == "cuda"
    heads = chance.choice((1, 2, 5, 8, 12, 16, 25, 32) if gpu else (1, 2, 5))
    groups = [n for n in (1, 2, 4, 5) if heads % n == 0]
    form = FORMS[number % len(FORMS)]
    return Shape(
        heads=heads,
        kv_heads=heads // chance.choice(groups),
        head_dim=chance.choice((32, 48, 64, 80, 96, 128) if gpu else (8, 16)),
        hidden=chance.choice((4, 7, 16, 24, 32, 48, 64) if gpu else (4, 7)),
        dtype=chance.choice(("bf16", "bf16", "fp16", "fp32") if gpu else ("fp16", "fp32")),
        form=form,
        fire=form != "dape3" and chance.random() < 0.2,
        causal=chance.random() < 0.7,
        padded=chance.random() < 0.3,
    )


def draw_call(chance: random.Random, shape: Shape, device: str, backends: tuple[str, ...]) -> Call:
    """Return a random call of a shape."""
    longest = 600 if device == "cuda" else 40
    rows = chance.choice((1, 3, longest // 4 + 1, longest // 2, longest - 1))
    offset = chance.choice((0, 0, 0, 17, longest // 2, -5))
    keys = max(1, rows + offset + chance.choice((0, 0, 0, 9, -2)))
    size = rows * keys * shape.heads
    return Call(
        shape=shape,
        backend=chance.choice(backends),
        bias="fire" if shape.fire else chance.choice(TABLES),
        batch=max(1, min(chance.choice((1, 2, 5)), 2**23 // size)),
        rows=rows,
        keys=keys,
        offset=offset,
        scores=chance.choice((0.0, 0.0, 0.0, 0.0, 30.0, 100.0)),
        level=chance.choice((0.0, 0.0, 0.0, 0.0, 100.0, 1e4, -1e5)),
        seed=chance.randrange(2**31),
    )


class Large(Bias):
    """A bias that is large: times 1 + |level| / 100, with a level added."""

    relative = True

    def __init__(self, inner: Bias, level: float) -> None:
        super().__init__(inner.num_heads)
        self.inner, self.level = inner, level

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return self.inner(query_positions, key_positions) * (1 + abs(self.level) / 100) + self.level


def modules(call: Call) -> tuple[nn.Module | None, nn.Module | None]:
    """Return bias and adapter in float32, on the CPU."""
    heads, form, level = call.shape.heads, call.shape.form, call.level
    bias = None if call.bias == "none" else BIASES[call.bias](heads)
    if bias is not None and level:
        if call.bias == "fire":
            with torch.no_grad():
                bias.weight_out.mul_(1 + abs(level) / 100)
                bias.bias_out.add_(level)
        else:
            bias = Large(bias, level)
    if form == "none":
        return bias, None
    if form == "talking heads":
        adapter = dape.TalkingHeads(heads)
        nn.init.normal_(adapter.weight, std=0.3)
        return bias, adapter
    inputs = form if form in ("sum", "bias", "scores") else "concat"
    taps = 3 if form == "dape3" else 1
    return bias, dape.DAPE(heads, call.shape.hidden, taps, form != "no residual", inputs)


def inputs(call: Call, device: str) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Return query, key and value, the gradient of the output, and the keys that may be seen."""
    shape, generator = call.shape, torch.Generator(device).manual_seed(call.seed)

    def normal(heads: int, length: int) -> Tensor:
        size = (call.batch, heads, length, shape.head_dim)
        return torch.randn(size, generator=generator, device=device)

    query, key, value = (
        normal(shape.heads, call.rows) + call.scores,
        normal(shape.kv_heads, call.keys) + call.scores / 4,
        normal(shape.kv_heads, call.keys),
    )
    cotangent, seen = normal(shape.heads, call.rows), None
    if shape.padded:
        first = torch.randint(call.keys, (call.batch, 1), generator=generator, device=device)
        seen = torch.arange(call.keys, device=device) >= first
    dtype = DTYPES[shape.dtype]
    return [x.to(dtype) for x in (query, key, value)], cotangent.to(dtype), seen


class SoftmaxValue(torch.autograd.Function):
    """softmax(S) V with the roundings of a fused kernel: P, O, and dS = P (dP - dO O)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, visible: Tensor, value: Tensor) -> Tensor:
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1).masked_fill(~visible, 0)
        out = (weights.to(value.dtype).to(weights) @ value.to(weights)).to(value.dtype)
        ctx.save_for_backward(weights, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        weights, value, out = ctx.saved_tensors
        rounded, wide = weights.to(value.dtype).to(weights), grad.to(weights)
        mean = (wide * out).sum(-1, keepdim=True)
        shift = weights * (wide @ value.to(weights).mT - mean)
        return shift.to(value.dtype).to(weights), None, (rounded.mT @ wide).to(value.dtype)


def textbook(
    call: Call, tensors: list[Tensor], parts: tuple[nn.Module | None, ...], seen: Tensor | None
) -> Tensor:
    """Return the output of the formula, rounded as a fused kernel in the value's dtype does."""
    shape, (bias, adapter) = call.shape, parts
    value = tensors[2]
    query, key, _ = widened(*tensors)
    rows, keys = (torch.arange(x.shape[2], device=x.device) for x in (query, key))
    mask = None if seen is None else seen[:, None, None]
    visible = visibility(len(rows), len(keys), mask, shape.causal, call.offset, query.device)
    group, scale = shape.heads // shape.kv_heads, 1 / math.sqrt(shape.head_dim)
    scores = query @ key.repeat_interleave(group, 1).mT * scale
    shift = torch.zeros_like(scores[0]) if bias is None else bias(rows + call.offset, keys)
    shift = shift.to(scores.dtype)
    logits = scores + shift
    if adapter is not None:
        block = Rows(query, key, rows + call.offset, keys, visible, scale)
        logits = adapter(scores, shift, *([block] if getattr(adapter, "needs_rows", False) else []))
    return SoftmaxValue.apply(logits, visible, value.repeat_interleave(group, 1))


def solve(call: Call, attend: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return output and gradients by name, by a backend or by the textbook in a dtype."""
    torch.manual_seed(call.seed)
    parts = tuple(m and m.to(device) for m in modules(call))
    tensors, cotangent, seen = inputs(call, device)
    if dtype == torch.float64:
        parts = tuple(m and copy.deepcopy(m).double() for m in parts)
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    if attend == "textbook":
        out = textbook(call, tensors, parts, seen)
    else:
        out = dape.attention(
            *tensors, *parts, causal=call.shape.causal, query_offset=call.offset,
            backend=attend, mask=seen,
        )  # fmt: skip
    leaves = dict(zip(("query", "key", "value"), tensors, strict=True))
    for place, module in zip(("bias", "adapter"), parts, strict=True):
        if module is not None:
            leaves |= {f"{place}.{name}": x for name, x in module.named_parameters()}
    found = torch.autograd.grad(
        out, list(leaves.values()), cotangent.to(out.dtype), allow_unused=True
    )
    gradients = zip(leaves.items(), found, strict=True)
    return {"output": out.detach()} | {
        name: torch.zeros_like(leaf) if x is None else x for (name, leaf), x in gradients
    }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a call: its worst tensor, and that error over the one it may have."""

    call: Call
    outcome: str  # right, off, not finite, refused, crashed
    ratio: float = 0.0
    detail: str = ""


def judge(call: Call, device: str) -> Verdict:
    """Return the verdict on a call."""
    dtype = DTYPES[call.shape.dtype]
    try:
        found = solve(call, call.backend, dtype, device)
    except UserError as error:
        return Verdict(call, "refused", detail=str(error))
    except Exception as error:
        return Verdict(call, "crashed", detail=f"{type(error).__name__}: {error}"[:300])
    exact = solve(call, "textbook", torch.float64, device)
    mixed = call.shape.form != "none" and dtype != torch.float32
    rounded = solve(call, "textbook", torch.bfloat16 if mixed else dtype, device)
    worst, name = max((ratio(name, found, rounded, exact, call), name) for name in exact)
    if not all(x.isfinite().all() for x in found.values()):
        name = next(name for name, x in found.items() if not x.isfinite().all())
        return Verdict(call, "not finite", math.inf, name)
    return Verdict(call, "off" if worst > TIMES else "right", worst, name)


def ratio(
    name: str,
    found: dict[str, Tensor],
    rounded: dict[str, Tensor],
    exact: dict[str, Tensor],
    call: Call,
) -> float:
    """Return the error of a tensor over the yardstick's, both with some digits of its size.

    Gradients may vanish: the size is no less than a tenth of what is usual among those of its
    module, or that of numbers of order one. float32 itself holds large logits to some digits only.
    """
    true, place = exact[name], name.partition(".")[0]
    module = [x for other, x in exact.items() if other.partition(".")[0] == place]
    square = sum(x.square().sum().item() for x in module) / sum(x.numel() for x in module)
    least = max(1.0 if "." in name else 0.5, 0.1 * math.sqrt(square)) * math.sqrt(true.numel())
    size, logit = max(true.norm().item(), least), call.scores**2 * call.shape.head_dim**0.5 / 4
    slack = (SLACK[call.shape.dtype] + 3e-7 * (abs(call.level) + logit)) * size / TIMES
    error, yardstick = ((x[name].double() - true).norm().item() for x in (found, rounded))
    return (error + 1e-300) / (min(yardstick, size) + slack)


def long_calls() -> Iterator[Call]:
    """Yield calls of 512 queries against as many keys as there may be."""
    for bias, form, keys in product((*TABLES, "fire"), ("none", "concat"), (524_288, 1_048_576)):
        shape = Shape(4, 4, 64, 8, "bf16", form, bias == "fire", causal=True, padded=False)
        yield Call(shape, "auto", bias, 1, 512, keys, keys - 512, 0.0, 0.0, 0)


def judge_long(call: Call, device: str) -> Verdict:
    """Return whether all is finite, and the last rows as in float64.

    float32 itself does not tell neighbours apart where a bias is beyond 1e5.
    """
    try:
        found = solve(call, call.backend, DTYPES[call.shape.dtype], device)
    except Exception as error:
        return Verdict(call, "crashed", detail=f"{type(error).__name__}: {error}"[:300])
    bad = [name for name, x in found.items() if not x.isfinite().all()]
    if bad:
        return Verdict(call, "not finite", math.inf, bad[0])
    torch.manual_seed(call.seed)
    parts = [m and m.to(device).double() for m in modules(call)]
    (query, key, value), _, _ = inputs(call, device)
    with torch.no_grad():
        exact = dape.attention(
            *(x.double() for x in (query[:, :, -2:], key, value)), *parts,
            query_offset=call.keys - 2, backend="chunked",
        )  # fmt: skip
    error = ((found["output"][:, :, -2:].double() - exact).norm() / exact.norm()).item()
    loose = call.bias in ("alibi", "kerple-power") and call.shape.form != "none"
    return Verdict(call, "off" if error > 0.05 and not loose else "right", error / 0.05, "output")


def run_shape(
    number: int, *, count: int, seed: int, device: str, backends: tuple[str, ...]
) -> list[Verdict]:
    """Return the verdicts on the calls of a shape, in a process of its own."""
    torch.set_num_threads(1)
    chance = random.Random(1000 * seed + number)
    shape = draw_shape(chance, device, number)
    return [judge(draw_call(chance, shape, device, backends), device) for _ in range(count)]


def run_shapes(
    task: Callable[[int], list[Verdict]], shapes: int, workers: int, minutes: float
) -> Iterator[list[Verdict]]:
    """Yield the verdicts on each shape as it is done, until the minutes are over."""
    if not workers:
        yield from map(task, range(shapes))
        return
    end = time.monotonic() + 60 * minutes
    with get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        found = pool.imap_unordered(task, range(shapes))
        for done in range(shapes):
            try:
                yield found.next(timeout=max(0.0, end - time.monotonic()))
            except TimeoutError:
                print(f"{minutes:g} minutes are over: {shapes - done} shapes were not tried")
                return


def report(verdicts: list[Verdict], seed: int, seconds: float) -> bool:
    """Print a line for each kind, and for each call that is not right; return whether all are."""
    kinds: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        kinds[verdict.call.kind].append(verdict)
    names = ("right", "off", "not finite", "crashed", "refused")
    print(f"{'kind':24}" + "".join(f"{name:>12}" for name in names) + f"{'worst':>9}")
    for kind, those in [*sorted(kinds.items()), ("all", verdicts)]:
        counts = Counter(verdict.outcome for verdict in those)
        worst = max(verdict.ratio for verdict in those)
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
        "--minutes", type=float, default=60, help="limit of the random calls of workers"
    )
    parser.add_argument("--backends", nargs="+", default=None)
    parser.add_argument("--long", action=argparse.BooleanOptionalAction, default=cuda)
    given = parser.parse_args(arguments)
    backends = tuple(given.backends or (GPU_BACKENDS if given.device == "cuda" else ("chunked",)))
    begun, each = time.perf_counter(), -(-given.calls // given.shapes)
    task = partial(run_shape, count=each, seed=given.seed, device=given.device, backends=backends)
    verdicts: list[Verdict] = []
    for done, found in enumerate(run_shapes(task, given.shapes, given.workers, given.minutes), 1):
        verdicts += found
        wrong = sum(verdict.outcome not in ("right", "refused") for verdict in found)
        print(f"shape {done} of {given.shapes}: {len(found)} calls, {wrong} wrong", flush=True)
    right = report(verdicts, given.seed, time.perf_counter() - begun)
    if given.long:
        print("\n512 queries against 524,288 and 1,048,576 keys")
        begun = time.perf_counter()
        verdicts = [judge_long(call, given.device) for call in long_calls()]
        right &= report(verdicts, 0, time.perf_counter() - begun)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
