"""`dape bench attention`: all methods are checked at all lengths, then all are timed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dape.bench.case import Attend, Case, Inputs, Parts, build, draw, sets, shape, step
from dape.bench.clock import Timing, measure
from dape.bench.methods import Method, chosen, each_direction, sdpa_default
from dape.bench.parity import check_all
from dape.bench.record import Check, Entry, Missing, Results

# Reasons of absent checks at a length, by method and direction.
Unchecked = Mapping[tuple[str, str], Missing]


@dataclass(frozen=True, slots=True)
class Plan:
    """The measured calls: `tokens // length` sequences per length, at least 1."""

    scheme: str
    shape: str
    lengths: tuple[int, ...]
    tokens: int
    methods: tuple[str, ...]
    dtype: str
    device: torch.device
    seed: int

    @property
    def cases(self) -> list[Case]:
        """Return a case for each length."""
        heads, head_dim = shape(self.shape)
        return [
            Case(
                scheme=self.scheme,
                heads=heads,
                head_dim=head_dim,
                length=length,
                batch=max(1, self.tokens // length),
                dtype=self.dtype,
                device=self.device,
                seed=self.seed,
            )
            for length in self.lengths
        ]


def run(
    plan: Plan,
    provenance: dict[str, Any],
    announce: Callable[[Check | Entry], None],
    keep: Callable[[Results], None],
) -> Results:
    """Return all results; every check and entry is announced, and the results so far are kept.

    Raises:
        UserError: for an unknown scheme, method or shape, and for a wrong method.
    """
    cases, methods = plan.cases, chosen(plan.methods)
    checks = check_all(cases, methods, announce)
    results = Results(
        scheme=plan.scheme,
        shape=plan.shape,
        heads=cases[0].heads,
        head_dim=cases[0].head_dim,
        dtype=plan.dtype,
        tokens=plan.tokens,
        seed=plan.seed,
        provenance=provenance,
        yardstick=sdpa_default(draw(cases[0], 1)[0]),
        checks=checks,
    )
    for case in cases:
        unchecked = {
            (check.method, check.direction): check.missing
            for check in checks
            if check.length == case.length and check.missing is not None
        }
        for entry in entries_at(case, methods, unchecked):
            results.entries.append(entry)
            announce(entry)
            keep(results)
    return results


def entries_at(case: Case, methods: Sequence[Method], unchecked: Unchecked) -> Iterator[Entry]:
    """Yield the entries of the methods at a length, in all directions."""
    parts, inputs = build(case), draw(case, sets(case))
    for method in methods:
        own = method.parts(parts)
        action = partial(timed, method, case, own, inputs, unchecked)
        for direction, found in each_direction(method, case, own, action):
            yield entry(method, case, direction, found)


def timed(
    method: Method,
    case: Case,
    parts: Parts,
    inputs: Sequence[Inputs],
    unchecked: Unchecked,
    attend: Attend,
    direction: str,
) -> Timing | Missing:
    """Return the timing of a method; unchecked methods are not timed."""
    if (method.name, direction) in unchecked:
        return unchecked[method.name, direction]
    calls = [partial(step, attend, each, parts, direction) for each in inputs]
    return measure(calls, case.device)


def entry(method: Method, case: Case, direction: str, found: Timing | Missing) -> Entry:
    """Return the entry of a method's timing."""
    return entry_at((method.name, case.length, case.batch, direction), found)


def entry_at(place: tuple[str, int, int, str], found: Timing | Missing) -> Entry:
    """Return an entry of method, length, batch, direction and timing."""
    if isinstance(found, Missing):
        return Entry(*place, missing=found)
    return Entry(
        *place,
        milliseconds=found.median,
        fastest=min(found.milliseconds),
        slowest=max(found.milliseconds),
        runs=len(found.milliseconds),
        calls=found.calls,
        clock=found.clock,
        peak=found.peak,
        eager=found.eager,
        launches=found.launches,
    )
