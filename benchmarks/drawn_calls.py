"""Random calls of attention: sizes, what is added to the scores, and tensors."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import dape
from dape.attention import call as attention_call
from dape.attention.call import checked
from dape.positions.bias import Bias
from dape.positions.scheme import BASES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BIASES = {name: scheme.bias.module for name, scheme in BASES.items() if scheme.bias is not None}
TABLES = ("none", *(name for name in BIASES if name != "fire"))
TAPS = {"dape3": 3, "dape5": 5}
FORMS = ("none", "concat", "sum", "bias", "scores", "no residual", "talking heads", *TAPS)
GPU_BACKENDS = ("auto", "auto", "cuda", "triton", "chunked")
# Heads before tokens, or behind, as projections give them; one element for the whole batch; a part
# of larger tensors, whose rows begin anywhere.
LAYOUTS = ("plain", "plain", "tokens first", "expanded", "cut out")
# Of shape [B, Tk]; the same for all elements, [1, 1, 1, Tk]; and of every row, [B, 1, Tq, Tk].
MASKS = ("left", "holes", "one for all", "rows")


@dataclass(frozen=True, slots=True)
class Shape:
    """What kernels are compiled for."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    hidden: int
    dtype: str
    form: str
    fire: bool
    causal: bool
    masked: bool


@dataclass(frozen=True, slots=True)
class Call:
    """One call: a shape, and what is drawn beside it."""

    shape: Shape
    backend: str
    bias: str
    batch: int
    rows: int
    keys: int
    offset: int  # of the first query, counted from the first key
    scores: float = 0.0  # added to queries, a quarter to keys: their product is near this squared
    level: float = 0.0  # what the bias is times, or what is added to it
    seed: int = 0
    key_offset: int = 0
    scale: float | None = None
    mask: str | None = None
    document: int | None = None  # tokens of a document, where positions restart
    layout: str = "plain"
    parts: int = 1  # of the keys, merged by their log-sum-exp
    lse: bool = False  # whether the log-sum-exp is a result with a gradient

    @property
    def kind(self) -> str:
        """Return the line of the table that counts it."""
        return f"{self.shape.form}, {'fire' if self.shape.fire else 'table'}"


def draw_shape(chance: random.Random, device: str, number: int) -> Shape:
    """Return random sizes; forms take turns, so that each is there."""
    gpu = device == "cuda"
    heads = chance.choice((1, 2, 3, 5, 8, 12, 16, 20, 25, 32) if gpu else (1, 2, 3, 5))
    groups = [n for n in (1, 2, 3, 4, 5, heads) if heads % n == 0]
    form, sizes = FORMS[number % len(FORMS)], (32, 48, 64, 80, 96, 128) if gpu else (8, 16)
    head_dim = chance.choice(sizes)
    return Shape(
        heads=heads,
        kv_heads=heads // chance.choice(groups),
        head_dim=head_dim,
        value_dim=chance.choice((head_dim, head_dim, head_dim, *sizes)),
        hidden=chance.choice((4, 7, 16, 24, 32, 48, 64) if gpu else (4, 7)),
        dtype=chance.choice(("bf16", "bf16", "fp16", "fp32") if gpu else ("fp16", "fp32")),
        form=form,
        fire=form not in TAPS and chance.random() < 0.2,
        causal=chance.random() < 0.7,
        masked=chance.random() < 0.3,
    )


def draw_call(chance: random.Random, shape: Shape, device: str, backends: tuple[str, ...]) -> Call:
    """Return a random call of a shape; what the kernels refuse goes to `auto`, or to chunks."""
    longest = 600 if device == "cuda" else 40
    rows = chance.choice((1, 3, longest // 4 + 1, longest // 2, longest - 1))
    offset = chance.choice((0, 0, 0, 17, longest // 2, -5))
    keys = max(1, rows + offset + chance.choice((0, 0, 0, 9, -2)))
    mask = chance.choice(MASKS) if shape.masked else None
    document = chance.choice((None,) * 9 + (1 + longest // 7,))
    backend = chance.choice(backends)
    if document or mask == "rows":
        backend = "auto" if "auto" in backends else "chunked"
    return Call(
        shape=shape,
        backend=backend,
        bias="fire" if shape.fire else chance.choice(TABLES),
        batch=max(1, min(chance.choice((1, 2, 5)), 2**23 // (rows * keys * shape.heads))),
        rows=rows,
        keys=keys,
        offset=offset,
        scores=chance.choice((0.0, 0.0, 0.0, 0.0, 30.0, 100.0)),
        level=chance.choice((0.0, 0.0, 0.0, 0.0, 100.0, 1e4, -1e5)),
        seed=chance.randrange(2**31),
        key_offset=chance.choice((0, 0, 0, 1000)),
        scale=chance.choice((None, None, None, None, 0.3, -0.1, 0.0)),
        mask=mask,
        document=document,
        layout=chance.choice(LAYOUTS),
        parts=chance.choice((1, 1, 1, 3)),
        lse=chance.random() < 0.3,
    )


def long_calls() -> Iterator[Call]:
    """Yield calls of 512 queries against as many keys as there may be, or more than 2^31 numbers.

    The last two have 655,360 keys, or queries, of 32 heads of 128: places need 64 bits.
    """
    for bias, form, keys in product((*TABLES, "fire"), ("none", "concat"), (524_288, 1_048_576)):
        shape = Shape(4, 4, 64, 64, 8, "bf16", form, bias == "fire", True, False)
        yield Call(shape, "auto", bias, 1, 512, keys, keys - 512)
    wide = Shape(32, 32, 128, 128, 8, "fp16", "none", False, True, False)
    yield Call(wide, "triton", "kerple", 1, 64, 655_360, 655_296)
    yield Call(wide, "triton", "kerple", 1, 655_360, 64, 0)


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
    seen = form if form in ("sum", "bias", "scores") else "concat"
    taps, residual = TAPS.get(form, 1), form != "no residual"
    return bias, dape.DAPE(heads, call.shape.hidden, taps, residual, seen)


def tensors_of(
    call: Call, device: str, draw: int = 0
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Return query, key and value, and the gradients of the output and of the log-sum-exp.

    Another `draw` gives other numbers of the same size.
    """
    shape, generator = call.shape, torch.Generator(device).manual_seed(call.seed + draw)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    query = normal(call.batch, shape.heads, call.rows, shape.head_dim) + call.scores
    key = normal(call.batch, shape.kv_heads, call.keys, shape.head_dim) + call.scores / 4
    value = normal(call.batch, shape.kv_heads, call.keys, shape.value_dim)
    cotangent = normal(call.batch, shape.heads, call.rows, shape.value_dim)
    dtype, of_lse = DTYPES[shape.dtype], normal(call.batch, shape.heads, call.rows)
    found = [laid_out(x.to(dtype), call.layout) for x in (query, key, value)]
    return found, (cotangent.to(dtype), of_lse)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return a tensor in a layout of memory."""
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "cut out":
        return pad(x, (3, 2, 1, 2, 0, 1))[:, :-1, 1:-2, 3:-2]
    return x


def given(
    call: Call, tensors: list[Tensor], parts: tuple[nn.Module | None, ...], draw: int = 0
) -> attention_call.Call:
    """Return the call as `dape.attention` makes it of tensors, bias and adapter."""
    rows, keys = (torch.arange(n, device=tensors[0].device) for n in (call.rows, call.keys))
    mask, positions = mask_of(call, tensors[0].device, draw), (None, None)
    if call.document:
        places = rows + call.offset, keys
        positions = tuple(x % call.document for x in places)
        one, other = (x.div(call.document, rounding_mode="floor") for x in places)
        same = (one[:, None] == other)[None, None]
        mask = same if mask is None else same & (mask if mask.ndim == 4 else mask[:, None, None])
    return checked(
        *tensors, *parts, mask, call.scale, *positions, causal=call.shape.causal,
        query_offset=call.offset + call.key_offset, key_offset=call.key_offset,
    )  # fmt: skip


def mask_of(call: Call, device: torch.device, draw: int) -> Tensor | None:
    """Return the keys that may be seen, true in about half of all places."""
    if call.mask is None:
        return None
    chance = torch.Generator(device).manual_seed(call.seed + 1 + draw)
    if call.mask == "left":
        first = torch.randint(call.keys, (call.batch, 1), generator=chance, device=device)
        return torch.arange(call.keys, device=device) >= first
    shape = {
        "holes": (call.batch, call.keys),
        "one for all": (1, 1, 1, call.keys),
        "rows": (call.batch, 1, call.rows, call.keys),
    }[call.mask]
    return torch.rand(shape, generator=chance, device=device) < 0.5


def cuts(call: Call) -> list[slice]:
    """Return the parts of the keys."""
    number = min(call.parts, call.keys)
    ends = [math.ceil(n * call.keys / number) for n in range(number + 1)]
    return [slice(*both) for both in pairwise(ends)]
