"""Time and memory of whole models, measured by `dape bench model`, as tables."""

from dape.bench.model import DIRECTIONS, LOGITS, Cost, Costs
from dape.figures.speed import digits, milliseconds, origin
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
        f"Batch {costs.batch}, random weights. forward: bfloat16 weights, logits of the last "
        f"{LOGITS} tokens. forward + backward: float32 weights under bfloat16 autocast, the "
        "gradients of all parameters, no optimizer. next token: bfloat16 weights, the last token "
        "of the length with a cache of the others, by the wall clock, as in `generate`. On a CPU "
        "all is float32, and memory is not measured. Medians in "
        "milliseconds; GiB at the peak with the weights and the cache. textbook: whole score "
        "matrices, as the paper's formula; fused: the fastest backend of `dape.attention`."
    )


def tables(costs: Costs) -> list[Table]:
    """Return tables of milliseconds and of memory, by size and direction."""
    sizes = dict.fromkeys(cost.size for cost in costs.costs)
    found = []
    for size in sizes:
        for direction in DIRECTIONS:
            chosen = [c for c in costs.costs if (c.size, c.entry.direction) == (size, direction)]
            if chosen:
                found.append(_table(costs, size, direction, chosen))
    return found


def _table(costs: Costs, size: str, direction: str, chosen: list[Cost]) -> Table:
    lengths = list(dict.fromkeys(cost.entry.length for cost in chosen))
    rows = []
    for scheme, form in dict.fromkeys((cost.entry.method, cost.form) for cost in chosen):
        line = [costs.find(size, scheme, form, length, direction) for length in lengths]
        base = [costs.find(size, YARDSTICK, "fused", length, direction) for length in lengths]
        rows.append(
            [
                f"{scheme}, {form}",
                *map(_time, line, base),
                *map(_memory, line),
            ]
        )
    header = [*(f"{n:,} (ms)" for n in lengths), *(f"{n:,} (GiB)" for n in lengths)]
    return Table(
        title=f"{size}, {direction}",
        header=["scheme", *header],
        rows=rows,
        note=f"In brackets: the ratio to {YARDSTICK}, fused.",
    )


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
