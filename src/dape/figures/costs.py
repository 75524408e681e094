"""Time and memory of whole models, measured by `dape bench model`, as tables."""

from dataclasses import replace

from dape.bench.model import DIRECTIONS, LOGITS, Cost, Costs
from dape.figures.speed import digits, milliseconds, origin, unsteady
from dape.figures.tables import NOTHING, Table

GIB = 2**30
YARDSTICK = "nope"  # the divisor of ratios, if measured


def page(costs: Costs) -> str:
    """Return all tables in Markdown, with explanation and origin."""
    parts = ["# Time and memory of whole models", explanation(costs)]
    parts += [each.markdown() for each in tables(costs)]
    return "\n\n".join([*parts, origin(costs.provenance, costs.seed)]) + "\n"


def explanation(costs: Costs) -> str:
    """Return the explanation of the numbers."""
    return (
        f"Batch {costs.batch}, random weights, and zero in the last layer of adapters, because a "
        "new layer over ALiBi makes log-sum-exps beyond 128, and a slower training. forward: "
        f"bfloat16 weights, logits of the last {LOGITS} tokens. forward + backward: float32 "
        "weights under bfloat16 autocast, the gradients of all parameters, no optimizer. Where the "
        "host limits the speed of both, the time is inside a CUDA graph, as in a training with "
        "hardware.compile: graphs; eager: the same by the wall clock without a graph. next "
        "token: bfloat16 weights, the last token of the length with a cache of the others, by the "
        "wall clock, as generate computes it. On a CPU all is float32, and memory is not measured. "
        "Medians in milliseconds; GiB at the peak with the weights and the cache. textbook: whole "
        "score matrices, as the paper's formula; fused: the fastest backend of dape.attention."
    )


def tables(costs: Costs) -> list[Table]:
    """Return tables of milliseconds and of memory, by size and direction, also of eager calls."""
    sizes = dict.fromkeys(cost.size for cost in costs.costs)
    found = []
    for size in sizes:
        for direction in DIRECTIONS:
            chosen = [c for c in costs.costs if (c.size, c.entry.direction) == (size, direction)]
            if chosen:
                found.append(_table(costs, size, direction, chosen))
            if any(cost.entry.eager is not None for cost in chosen):
                found.append(_table(costs, size, direction, chosen, eager=True))
    return found


def _table(
    costs: Costs, size: str, direction: str, chosen: list[Cost], eager: bool = False
) -> Table:
    lengths = list(dict.fromkeys(cost.entry.length for cost in chosen))
    rows = []
    for scheme, form in dict.fromkeys((cost.entry.method, cost.form) for cost in chosen):
        line = [costs.find(size, scheme, form, length, direction) for length in lengths]
        base = [costs.find(size, YARDSTICK, "fused", length, direction) for length in lengths]
        if eager:
            line, base = [*map(_eager, line)], [*map(_eager, base)]
        times = map(_time, line, base)
        rows.append([f"{scheme}, {form}", *times, *(() if eager else map(_memory, line))])
    header = [f"{n:,} (ms)" for n in lengths]
    named = ((f"{c.entry.method}, {c.form}, {c.entry.length:,}", c.entry) for c in chosen)
    return Table(
        title=f"{size}, {direction}{', eager' if eager else ''}",
        header=["scheme", *header, *(() if eager else (f"{n:,} (GiB)" for n in lengths))],
        rows=rows,
        note=" ".join(
            [
                f"In brackets: the ratio to {YARDSTICK}, fused.",
                *(_of_host(chosen) if eager else unsteady(named)),
            ]
        ),
    )


def _of_host(chosen: list[Cost]) -> list[str]:
    """Return a sentence on the host's time for a launch, by calls that wait mostly for the host."""
    entries = [cost.entry for cost in chosen]
    found = [
        1000 * e.eager / e.launches
        for e in entries
        if e.eager and e.launches and e.milliseconds and e.eager > 2 * e.milliseconds
    ]
    if not found:
        return []
    least, most = min(found), max(found)
    return [
        f"The host took {digits(least)} to {digits(most)} microseconds a launch: two rows less"
        f" than {digits(most / least)} times apart may differ by the host alone."
    ]


def _eager(cost: Cost | None) -> Cost | None:
    """Return a cost with the time of an eager call; a time without a graph is of eager calls."""
    if cost is None or cost.entry.eager is None:
        return cost
    return replace(cost, entry=replace(cost.entry, milliseconds=cost.entry.eager))


def _time(cost: Cost | None, base: Cost | None) -> str:
    if cost is None:
        return NOTHING
    ours, theirs = cost.entry.milliseconds, base and base.entry.milliseconds
    ratio = f" ({digits(ours / theirs)})" if ours and theirs else ""
    return milliseconds(cost.entry) + ratio


def _memory(cost: Cost | None) -> str:
    if cost is None or cost.entry.peak is None:
        return NOTHING
    return digits((cost.entry.peak + cost.weights) / GIB)
