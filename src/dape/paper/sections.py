"""Sections of an experiment's results: related tables, with a figure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import TYPE_CHECKING

import numpy as np

from dape.bench import model
from dape.evaluate import context, learned
from dape.evaluate.compare import compare
from dape.figures import context as context_figures
from dape.figures import costs as cost_figures
from dape.figures import learned as learned_figures
from dape.figures import tables
from dape.figures.curves import over_length
from dape.figures.tables import NOTHING, Table
from dape.paper import record
from dape.paper.cells import Cell, by_setting
from dape.paper.panel import Panel, panels
from dape.paper.published import Published, published
from dape.paper.sweep import CONTEXT, COSTS, LEARNED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TALLEST = 2.5  # top of a figure over the lowest value, for a diverged line
OURS = "published"  # ends the label of a published row


@dataclass(frozen=True, slots=True)
class Section:
    """Related tables, with a figure and a caption."""

    name: str
    tables: tuple[Table, ...]
    figure: "Figure | None" = None
    caption: str = ""

    @property
    def file(self) -> str:
        """Return the name of the figure's file."""
        return f"{self.name}.svg"


def curves(cells: Sequence[Cell]) -> list[Section]:
    """Return the perplexities of each setting beside published perplexities, and the tests."""
    return [_curves(panel) for panel in panels(cells)]


def heads(cells: Sequence[Cell]) -> list[Section]:
    """Return A, B and f(A, B) of recorded queries, by run and length."""
    files = [
        (cell, kept)
        for cell in cells
        for step in cell.steps
        for kept in step.keeps
        if kept.parent == LEARNED and (cell.record.path / kept).is_file()
    ]
    caption = "Scores A, bias B and adapter f(A, B) of one query over the keys, a line a head."
    found = []
    for cell, kept in files:
        made = learned.load(cell.record.path / kept)
        name = f"{cell.name.replace('/', '-')}-at-{kept.stem}"
        figure = learned_figures.draw(made)
        found.append(Section(name, (learned_figures.table(made),), figure, caption))
    return found


def uses(cells: Sequence[Cell]) -> list[Section]:
    """Return the gains from far text, by the last occurrence of the predicted token."""
    caption = "Gain in nats a token, by where the predicted token occurred last before."
    found = []
    for setting, members in by_setting(cells).items():
        files = [cell.record.path / CONTEXT for cell in members]
        records = [context.load(file) for file in files if file.is_file()]
        if records:
            shown = tuple(context_figures.tables(records))
            figure = context_figures.draw(records)
            found.append(Section(f"{setting.name}-context", shown, figure, caption))
    return found


def costs(cells: Sequence[Cell]) -> list[Section]:
    """Return time and memory of whole models, by scheme, form and length."""
    files = {cell.name: cell.record.path / COSTS for cell in cells}
    found = {name: model.load(file) for name, file in files.items() if file.is_file()}
    return [
        Section(
            name,
            tuple(cost_figures.tables(each)),
            caption=f"{cost_figures.explanation(each)} Measured on {each.provenance['device']}.",
        )
        for name, each in found.items()
    ]


SECTIONS: dict[str, Callable[[Sequence[Cell]], list[Section]]] = {
    "curves": curves,
    "heads": heads,
    "uses": uses,
    "costs": costs,
}


def _curves(panel: Panel) -> Section:
    """Return the perplexities of a panel beside the paper's, and the tests between arms."""
    if not panel.groups:
        return Section(panel.name, (trainings(panel),))
    comparisons = compare(panel.groups)
    tested = [tables.significance(comparisons)] if comparisons else []
    shown = (perplexities(panel), *tested, trainings(panel))
    values = np.concatenate([group.values("perplexity").ravel() for group in panel.groups])
    top = TALLEST * np.nanmin(values)
    caption = (
        "Perplexity against the length of the window, trained at"
        f" {panel.setting.length:,} tokens. Dashed: without an adapter; solid: with one."
    )
    if np.nanmax(values) > top:
        caption += f" Lines leave the figure at {TALLEST:g} times the lowest value."
    else:
        top = None
    return Section(panel.name, shown, over_length(panel.groups, top=top), caption)


def perplexities(panel: Panel) -> Table:
    """Return the perplexity by arm and length, with published perplexities below."""
    base = tables.results(panel.groups)
    lengths = panel.groups[0].evaluations[0].lengths
    rows = []
    for arm, *cells in base.rows:
        rows.append([arm, *cells])
        known = {each.length: each for each in _published(panel, arm)}
        if known:
            numbers = [tables.number(known[n].perplexity) if n in known else "" for n in lengths]
            rows.append([f"{arm}, {OURS}", "", *numbers])
    return replace(
        base,
        header=["arm", *base.header[1:]],
        rows=rows,
        note=" ".join(filter(None, [base.note, _places(panel)])),
    )


def trainings(panel: Panel) -> Table:
    """Return loss, cost and failures of the trainings, by arm."""
    rows = []
    for arm in panel.arms:
        cells = [cell for cell in panel.cells if cell.arm == arm]
        steps = [record.metrics(cell) for cell in cells if cell.name not in panel.errors]
        losses = [each[-1]["validation_loss"] for each in steps]
        speeds = [
            step["tokens_per_second"]
            for each in steps
            for step in each
            if "tokens_per_second" in step
        ]
        rows.append(
            [
                arm,
                str(len(losses)),
                f"{mean(losses):.4f}" if losses else NOTHING,
                f"{median(speeds):,.0f}" if speeds else NOTHING,
                f"{sum(record.read(cell).minutes for cell in cells):.1f}",
            ]
        )
    header = ["arm", "runs", "validation loss", "tokens a second", "minutes"]
    return Table("Trainings", header, rows, note=_training_note(panel))


def _published(panel: Panel, arm: str) -> list[Published]:
    return published(arm, panel.corpus, panel.setting.length, panel.setting.size)


def _places(panel: Panel) -> str:
    """Return source and reliability of the published numbers."""
    known = [each for arm in panel.arms for each in _published(panel, arm)]
    if not known:
        return ""
    places = dict.fromkeys(f"{each.place} ({each.sure})" for each in known)
    return f"Published, {known[0].size} on {known[0].corpus} of its own: {'; '.join(places)}."


def _training_note(panel: Panel) -> str:
    notes = [
        f"{panel.setting.tokens:,} tokens, {panel.epochs:.2g} epochs of a corpus with checksum"
        f" {panel.corpus_checksum[:12]}. Validation loss: the last at the training length, nats a"
        " token. Minutes on one device: all commands of the arm."
    ]
    notes += [f"{NOTHING} {name} failed: {error}." for name, error in panel.errors.items()]
    risen = panel.repeated_too_often()
    if risen:
        notes.append(f"Repeated too often, the validation loss rose again: {'; '.join(risen)}.")
    return " ".join(notes)
