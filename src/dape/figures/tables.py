"""Tables of results, for the screen, for Markdown and for the report."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from dape.evaluate.compare import METRICS, Comparison, Group
from dape.evaluate.record import Targets
from dape.evaluate.significance import FEWEST_DOCUMENTS, PairedTest
from dape.text import counted, markdown, one_line

NOTHING = "—"
NO_P = f"{NOTHING} no p: the pairs have no spread, or a loss is not finite."


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a header, rows of cells, and a note for the reader."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown."""
        ruler = ["---", *("---:" for _ in self.header[1:])]
        header, *rows = [[markdown(cell) for cell in row] for row in (self.header, *self.rows)]
        lines = [f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows)]
        return f"**{markdown(self.title)}**\n\n" + "\n".join(lines) + f"\n\n{markdown(self.note)}"

    def show(self) -> None:
        """Print the table in full width, with deviations under means.

        A narrow screen breaks lines, where rich would cut off digits.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text  # unlike in strings, brackets are no styles

        title, note = Text(one_line(self.title), "bold"), Text(one_line(self.note))
        table = RichTable(title=title, caption=note, box=box.SIMPLE_HEAD, pad_edge=False)
        table.title_justify = table.caption_justify = "left"
        for place, name in enumerate(self.header):
            side: Literal["left", "right"] = "right" if place else "left"
            table.add_column(Text(one_line(name)), justify=side, no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(one_line(cell).replace(" ± ", "\n± ")) for cell in row))
        width = Console(width=sys.maxsize).measure(table).maximum
        Console(width=width).print(table, "")


def results(groups: Sequence[Group], metric: str = "perplexity") -> Table:
    """Return the metric by group and length, with the deviation over seeds."""
    first = groups[0].evaluations[0]
    trained = {group.train_length for group in groups}
    lengths = [f"{n:,}*" if n in trained else f"{n:,}" for n in first.lengths]
    rows = [[group.label, str(len(group.evaluations)), *_cells(group, metric)] for group in groups]
    notes = [describe_targets(groups)]
    if trained & set(first.lengths):
        notes.append("* length trained at.")
    if any(len(group.evaluations) > 1 for group in groups):
        notes.append("± one standard deviation over seeds.")
    notes += precisions(groups)
    notes += [refusal(group.label, group.refused) for group in groups if group.refused]
    notes += [
        f"{NOTHING} {group.label}: tokens without a fixed number of bytes."
        for group in groups
        if not _has(group, metric)
    ]
    return Table(
        title=f"{METRICS[metric].capitalize()} by length of the window",
        header=["scheme", "runs", *lengths],
        rows=rows,
        note=" ".join(notes),
    )


def describe_targets(groups: Sequence[Group]) -> str:
    """Return a sentence on the scored tokens and their context, and one on other scored tokens.

    Bits per byte also compare models whose tokenizers, and with them the scored tokens, differ.
    """
    targets = groups[0].evaluations[0].targets
    windows = {
        "last": f"the last {targets.block:,} tokens of each window",
        "sliding": f"the last {targets.block:,} tokens of windows that move by as many",
        "non_overlapping": "all tokens of windows that follow each other",
    }
    begins = " Each window begins with the model's token for the beginning of a text."
    others = [
        f"{group.label} has {_extent(theirs)}"
        for group in groups
        if (theirs := group.evaluations[0].targets) != targets
    ]
    differ = f" The scored text differs: {'; '.join(others)}." if others else ""
    return (
        f"Protocol {targets.protocol}: {windows[targets.protocol]}. At every length the same "
        f"{_extent(targets)} are scored.{begins if targets.bos else ''}{differ}"
    )


def _extent(targets: Targets) -> str:
    """Return the number of scored tokens, of their documents, and the split."""
    return (
        f"{counted(sum(targets.tokens), 'token')} of {counted(len(targets.documents), 'document')}"
        f" of the {targets.split} split"
    )


def precisions(groups: Sequence[Group]) -> list[str]:
    """Return a sentence on the precision of the products of each group, if precisions differ."""
    named: dict[str, dict[str, None]] = {}
    for group in groups:
        for each in group.evaluations:
            named.setdefault(each.provenance.get("precision", "unknown"), {})[group.label] = None
    if len(named) < 2:
        return []
    parts = (f"{precision} for {', '.join(labels)}" for precision, labels in sorted(named.items()))
    return [f"Precision of products: {'; '.join(parts)}."]


@runtime_checkable
class Tokenized(Protocol):
    """A record with the fingerprint of a tokenizer, None in records of earlier versions."""

    @property
    def tokenizer(self) -> str | None:
        """The fingerprint."""


def tokenizers(records: Sequence[Tokenized]) -> list[str]:
    """Return a sentence on different tokenizers of records, if any."""
    if len({each.tokenizer for each in records} - {None}) < 2:
        return []
    return ["The models have different tokenizers: a length is not the same text for all."]


def refusal(label: str, refused: Mapping[int, str]) -> str:
    """Return a sentence on refused lengths, with each reason as at the shortest length."""
    kinds: dict[str, list[int]] = {}
    for length in sorted(refused):  # reasons of a kind differ in their numbers
        kinds.setdefault(re.sub(r"[\d,]", "", refused[length]), []).append(length)
    parts = (
        f"{', '.join(f'{length:,}' for length in lengths)} tokens: {refused[lengths[0]]}"
        for lengths in kinds.values()
    )
    return f"{NOTHING} {label} refused {'; '.join(parts)}."


def significance(comparisons: Sequence[Comparison]) -> Table:
    """Return the change of perplexity of candidates against baselines, with p-values."""
    lengths = sorted({each.length for each in comparisons})
    rows, names = [], []
    for (candidate, baseline), pair in groupby(
        comparisons, key=lambda each: (each.candidate, each.baseline)
    ):
        by_length = {each.length: each for each in pair}
        each_length = [by_length.get(length) for length in lengths]
        over_seeds = [None if each is None else each.over_seeds for each in each_length]
        over_documents = [None if each is None else each.over_documents for each in each_length]
        rows.append([f"{candidate} against {baseline}", *map(change, each_length)])
        for label, outcomes in (("seeds", over_seeds), ("documents", over_documents)):
            found = [test for test in outcomes if test is not None]
            if found:
                rows.append([f"p over {found[0].pairs} {label}", *map(p_value, outcomes)])
                names.append(found[0].name)
    notes = [f"Two-sided p-values: {'; '.join(dict.fromkeys(names))}."] if names else []
    tests = [test for each in comparisons for test in (each.over_seeds, each.over_documents)]
    if any(test and math.isnan(test.p_value) for test in tests):
        notes.append(NO_P)
    if any(each.left_out for each in comparisons):
        notes.append("Runs of a seed that the other scheme lacks are left out.")
    if any(each.over_documents is None for each in comparisons):
        notes.append(f"Fewer than {FEWEST_DOCUMENTS} documents: no p over documents.")
    return Table(
        title="Change of perplexity, with p-values",
        header=["", *(f"{length:,}" for length in lengths)],
        rows=rows,
        note=" ".join(notes),
    )


def change(comparison: Comparison | None) -> str:
    """Return the change of the candidate's perplexity in percent, as `-12.3 %`.

    With several seeds the change is the ratio of geometric means.
    """
    return NOTHING if comparison is None else percent(comparison.difference)


def percent(difference: float) -> str:
    """Return a difference of losses as the change of perplexity, as `-12.3 %`."""
    with np.errstate(over="ignore"):
        return f"{100 * float(np.expm1(difference)):+,.1f} %"


def p_value(test: PairedTest | None) -> str:
    """Return a p-value with two significant digits, or the bound, or a dash for none."""
    if test is None or test.few or math.isnan(test.p_value):
        return NOTHING
    if test.least and test.p_value <= test.least:
        return f"< {test.least:.2g}"
    return f"{test.p_value:.2g}"


def _cells(group: Group, metric: str) -> list[str]:
    columns = zip(group.evaluations[0].lengths, group.values(metric).T, strict=True)
    return [
        NOTHING if length in group.refused or not _has(group, metric) else _cell(values, metric)
        for length, values in columns
    ]


def _has(group: Group, metric: str) -> bool:
    return metric != "bits_per_byte" or group.evaluations[0].targets.bytes is not None


def _cell(values: Float[np.ndarray, " seeds"], metric: str) -> str:
    mean = number(values.mean(), metric)
    return mean if len(values) == 1 else f"{mean} ± {number(values.std(ddof=1), metric)}"


def number(value: float | None, metric: str = "perplexity") -> str:
    """Return a value of the metric with the significant digits."""
    if value is None:
        return NOTHING
    if metric != "perplexity":
        return f"{value:.4f}"
    return f"{value:,.{2 if value < 1e4 else 0}f}" if value < 1e6 else f"{value:.1e}"
