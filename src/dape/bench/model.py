"""`dape bench model`: time and memory of whole models over the length.

A forward pass, training, and a token more with a cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dape.bench.attempt import attempt, release
from dape.bench.attention import entry_at
from dape.bench.case import FORWARD, TRAINING
from dape.bench.clock import Timing, by_wall_clock, measure
from dape.bench.record import Entry, Missing
from dape.errors import UserError, unknown
from dape.files import read_json, write_json
from dape.positions.scheme import resolve
from dape.provenance import Provenance
from dape.strict import build

if TYPE_CHECKING:
    from transformers import DynamicCache

FORMAT = 1
# Backends of `dape.attention` by the form of the computation.
FORMS = {"fused": "auto", "textbook": "reference"}
# Logits of a forward pass: the scored tokens of the protocol `last`.
LOGITS = 256
NEXT = "next token"
DIRECTIONS = (FORWARD, TRAINING, NEXT)


@dataclass(frozen=True, slots=True)
class Size:
    """Layers, width and heads of a model of the paper."""

    layers: int
    width: int
    heads: int


SIZES = {
    "small": Size(8, 512, 8),
    "125m": Size(12, 768, 12),
    "350m": Size(24, 1024, 16),
    "2.7b": Size(32, 2560, 32),
    "6.7b": Size(32, 4096, 32),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Models to measure: every size, scheme and form at every length, with `batch` sequences."""

    sizes: tuple[str, ...]
    schemes: tuple[str, ...]
    forms: tuple[str, ...]
    lengths: tuple[int, ...]
    batch: int
    directions: tuple[str, ...]
    vocab_size: int
    device: torch.device
    seed: int

    def check(self) -> None:
        """Refuse unknown names.

        Raises:
            UserError: for an unknown size, scheme or form.
        """
        for what, names, known in (("size", self.sizes, SIZES), ("form", self.forms, FORMS)):
            for name in names:
                if name not in known:
                    raise unknown(what, name, known)
        for name in self.schemes:
            resolve(name)


@dataclass(frozen=True, slots=True)
class Cost:
    """Time and memory of a model, as an `Entry` with the scheme for a method.

    `weights` are the bytes of the parameters, and do not count in the entry's peak.
    """

    size: str
    form: str
    weights: int
    entry: Entry


@dataclass(frozen=True, slots=True)
class Costs:
    """All costs of a command, with provenance."""

    batch: int
    seed: int
    provenance: Provenance
    costs: list[Cost] = field(default_factory=list)
    format: int = FORMAT

    def find(self, size: str, scheme: str, form: str, length: int, direction: str) -> Cost | None:
        """Return a cost, or None if not measured."""
        asked = (size, scheme, form, length, direction)
        return next((cost for cost in self.costs if _place(cost) == asked), None)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, asdict(self))


def load(path: Path) -> Costs:
    """Read the file of `Costs.save`.

    Raises:
        UserError: for a file that is missing, damaged or of another format.
    """
    return read_json(path, _costs, "measure again with `dape bench model`")


def run(plan: Plan, provenance: dict[str, Any], keep: Callable[[Costs, Cost], None]) -> Costs:
    """Return the costs of all models; `keep` gets the costs so far and the latest cost.

    A model is drawn once for a size, scheme and form. The last layer of adapters is zero: a new
    layer over ALiBi has log-sum-exps beyond 128 from 2,048 tokens on, and slows a training. Weights
    are float32 under bfloat16 autocast in training, and bfloat16 otherwise. On a CPU, weights and
    products are float32.

    Raises:
        UserError: for an unknown size, scheme or form.
    """
    plan.check()
    found = Costs(plan.batch, plan.seed, provenance)
    for size in plan.sizes:
        for scheme in plan.schemes:
            for form in plan.forms:
                for cost in _costs_of(plan, size, scheme, form):
                    found.costs.append(cost)
                    keep(found, cost)
    return found


def _costs_of(plan: Plan, size: str, scheme: str, form: str) -> Iterator[Cost]:
    """Yield the costs of a model: first in training, while the weights are float32."""
    model = attempt(partial(_build, plan, SIZES[size], scheme, form))
    for direction in (TRAINING, FORWARD, NEXT):
        if direction not in plan.directions:
            continue
        if isinstance(model, nn.Module) and direction != TRAINING and plan.device.type == "cuda":
            model = model.to(torch.bfloat16)
        weights = 0
        if isinstance(model, nn.Module):
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
        for length in plan.lengths:
            entry = _entry(plan, model, scheme, length, direction)
            yield Cost(size, form, weights, entry)
    del model
    release()


def _build(plan: Plan, size: Size, scheme: str, form: str) -> nn.Module:
    from dape.model.configuration import DapeConfig
    from dape.model.modeling import DapeForCausalLM
    from dape.model.retrofit.choice import silence

    config = DapeConfig(
        vocab_size=plan.vocab_size,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        scheme=scheme,
        backend=FORMS[form],
    )
    torch.manual_seed(plan.seed)
    with plan.device:
        model = DapeForCausalLM(config).eval()
    for module in model.modules():
        silence(module)
    return model


def _entry(
    plan: Plan, model: nn.Module | Missing, scheme: str, length: int, direction: str
) -> Entry:
    place = (scheme, length, plan.batch, direction)
    if isinstance(model, Missing):
        return entry_at(place, model)
    generator = torch.Generator(plan.device).manual_seed(plan.seed)
    shape = (plan.batch, length)
    tokens = torch.randint(plan.vocab_size, shape, generator=generator, device=plan.device)
    if direction == NEXT:
        return entry_at(place, attempt(partial(_next, model, tokens)))
    step = train if direction == TRAINING else read
    timing = attempt(partial(measure, [partial(step, model, tokens)], plan.device))
    return entry_at(place, timing)


def _next(model: nn.Module, tokens: Tensor) -> Timing:
    """Return the timing of the last token, with the cache in the peak of memory."""
    cache = cache_of(model, tokens[:, :-1])
    found = by_wall_clock(partial(continued, model, tokens[:, -1:], cache), tokens.device)
    kept = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return found if found.peak is None else found._replace(peak=found.peak + kept)


@torch.no_grad()
def read(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits of the last 256 tokens."""
    logits: Tensor = model(input_ids=tokens, logits_to_keep=LOGITS, use_cache=False).logits
    return logits


@torch.no_grad()
def cache_of(model: nn.Module, tokens: Tensor) -> "DynamicCache":
    """Return the cache of a model after some tokens."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    if tokens.shape[1]:
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def continued(model: nn.Module, token: Tensor, cache: "DynamicCache") -> Tensor:
    """Return the logits of a token after those in the cache, which stays as it was."""
    logits: Tensor = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    cache.crop(-1)
    return logits


def train(model: nn.Module, tokens: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the mean loss, under autocast on a GPU."""
    with torch.autocast(tokens.device.type, torch.bfloat16, tokens.device.type == "cuda"):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return torch.autograd.grad(loss, list(model.parameters()))


def _place(cost: Cost) -> tuple[str, str, str, int, str]:
    entry = cost.entry
    return cost.size, entry.method, cost.form, entry.length, entry.direction


def _costs(content: dict[str, Any]) -> Costs:
    if content.get("format") != FORMAT:
        raise UserError(f"not costs of format {FORMAT}")
    costs: Costs = build(Costs, content)
    return costs
