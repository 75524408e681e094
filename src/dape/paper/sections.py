"""Sections of an experiment's results: related tables, with a figure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import TYPE_CHECKING

import numpy as np

from dape.bench import model
from dape.evaluate import context, learned, retrieval
from dape.evaluate.compare import compare
from dape.evaluate.prompts import TASKS
from dape.evaluate.retrieval import Retrieval
from dape.figures import context as context_figures
from dape.figures import costs as cost_figures
from dape.figures import learned as learned_figures
from dape.figures import retrieval as retrieval_figures
from dape.figures import tables
from dape.figures.curves import over_length
from dape.figures.speed import conditions
from dape.figures.tables import NOTHING, Table
from dape.paper import record
from dape.paper.cells import Cell, by_regime, kept_files
from dape.paper.published import Published, published
from dape.paper.study import Study, studies
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
    """Return the perplexities of each regime beside published perplexities, and the tests."""
    return [_curves(study) for study in studies(cells)]


def heads(cells: Sequence[Cell]) -> list[Section]:
    """Return A, B and f(A, B) of recorded queries, by run and length."""
    caption = "Scores A, bias B and adapter f(A, B) of one query over the keys, a line a head."
    found = []
    for cell, file in kept_files(cells, LEARNED):
        made = learned.load(file)
        name = f"{cell.name.replace('/', '-')}-at-{file.stem}"
        figure = learned_figures.draw(made)
        found.append(Section(name, (learned_figures.table(made),), figure, caption))
    return found


def uses(cells: Sequence[Cell]) -> list[Section]:
    """Return the gains from far text, by the last occurrence of the predicted token."""
    caption = "Gain in nats a token, by where the predicted token occurred last before."
    found = []
    for regime, members in by_regime(cells).items():
        files = [cell.record.path / CONTEXT for cell in members]
        records = [context.load(file) for file in files if file.is_file()]
        if records:
            shown = tuple(context_figures.tables(records))
            figure = context_figures.draw(records)
            found.append(Section(f"{regime.name}-context", shown, figure, caption))
    return found


def retrievals(cells: Sequence[Cell]) -> list[Section]:
    """Return the fraction of hidden numbers found, by task, arm, depth and length."""
    caption = "Fraction of the hidden numbers that an arm finds, by depth and length of the text."
    found = []
    for regime, members in by_regime(cells).items():
        for task in TASKS:
            files = [(cell, cell.record.retrieval(task)) for cell in members]
            records = [
                _named(cell.arm, retrieval.load(file)) for cell, file in files if file.is_file()
            ]
            if records:
                table = retrieval_figures.table(records)
                shown = (replace(table, header=["arm", *table.header[1:]]),)
                figure = retrieval_figures.heat_map(records)
                found.append(Section(f"{regime.name}-{task}", shown, figure, caption))
    return found


def _named(arm: str, record: Retrieval) -> Retrieval:
    """Return a record under the name of the arm, for the label."""
    return replace(record, subject=replace(record.subject, scheme=arm))


def costs(cells: Sequence[Cell]) -> list[Section]:
    """Return time and memory of whole models, by scheme, form and length."""
    found: dict[str, list[model.Costs]] = {}
    for cell, file in kept_files(cells, COSTS.name):
        found.setdefault(cell.arm, []).append(model.load(file))
    return [_costs(name, of_lengths) for name, of_lengths in found.items()]


def _costs(name: str, of_lengths: Sequence[model.Costs]) -> Section:
    """Return the costs of a size and direction, with the origin of every length."""
    together = replace(of_lengths[0], costs=[cost for each in of_lengths for cost in each.costs])
    commands: dict[str, list[str]] = {}
    for each in of_lengths:
        place = f"{conditions(each.provenance, each.seed)}."
        commands.setdefault(place, []).append(f"`{each.provenance['command']}`")
    origins = (f"{', '.join(several)} {place}" for place, several in commands.items())
    caption = " ".join([cost_figures.explanation(together), *origins])
    return Section(name, tuple(cost_figures.tables(together)), caption=caption)


SECTIONS: dict[str, Callable[[Sequence[Cell]], list[Section]]] = {
    "curves": curves,
    "heads": heads,
    "uses": uses,
    "retrievals": retrievals,
    "costs": costs,
}


def _curves(study: Study) -> Section:
    """Return the perplexities of a study beside the paper's, and the tests between arms."""
    if not study.groups:
        return Section(study.name, (trainings(study),))
    comparisons = compare(study.groups)
    tested = [tables.significance(comparisons)] if comparisons else []
    shown = (perplexities(study), *tested, trainings(study))
    values = np.concatenate([group.values("perplexity").ravel() for group in study.groups])
    top = TALLEST * np.nanmin(values)
    caption = (
        "Perplexity against the length of the window, trained at"
        f" {study.regime.length:,} tokens. Dashed: encodings alone; solid: encodings with an"
        " adapter."
    )
    if any(len(group.evaluations) > 1 for group in study.groups):
        caption += " Shaded: one standard deviation over seeds."
    if np.nanmax(values) > top:
        caption += f" Lines leave the figure at {TALLEST:g} times the lowest value."
    else:
        top = None
    return Section(study.name, shown, over_length(study.groups, top=top), caption)


def perplexities(study: Study) -> Table:
    """Return the perplexity by arm and length, with published perplexities below."""
    base = tables.results(study.groups)
    lengths = study.groups[0].evaluations[0].lengths
    rows = []
    for arm, *cells in base.rows:
        rows.append([arm, *cells])
        known = {each.length: each for each in _published(study, arm)}
        if known:
            numbers = [tables.number(known[n].perplexity) if n in known else "" for n in lengths]
            rows.append([f"{arm}, {OURS}", "", *numbers])
    return replace(
        base,
        header=["arm", *base.header[1:]],
        rows=rows,
        note=" ".join(filter(None, [base.note, _places(study)])),
    )


def trainings(study: Study) -> Table:
    """Return tokens, loss, cost and failures of the trainings, by arm; means over runs."""
    rows = []
    for arm in study.arms:
        cells = [c for c in study.cells if c.arm == arm and c.name not in study.errors]
        rows.append([arm, str(len(cells)), *(_training(cells) if cells else [NOTHING] * 5)])
    header = ["arm", "runs", "validation loss", "tokens a second", "minutes", "tokens", "epochs"]
    return Table("Trainings", header, rows, note=_training_note(study))


def _training(cells: Sequence[Cell]) -> list[str]:
    """Return loss, speed, minutes, tokens and epochs of the finished trainings of an arm."""
    steps = [record.metrics(cell) for cell in cells]
    made = [cell.record.read_record() for cell in cells]
    tokens = mean(each.get("tokens", 0) for each in made)
    epochs = tokens / record.read(cells[0]).train_tokens
    loss = mean(each[-1]["validation_loss"] for each in steps)
    speeds = [s["tokens_per_second"] for each in steps for s in each if "tokens_per_second" in s]
    return [
        f"{loss:.4f}",
        f"{median(speeds):,.0f}" if speeds else NOTHING,
        f"{mean(each.get('seconds', 0.0) for each in made) / 60:.1f}",
        f"{tokens:,.0f}",
        f"{epochs:.2g}",
    ]


def _published(study: Study, arm: str) -> list[Published]:
    return published(arm, study.corpus, study.regime.length, study.regime.size)


def _places(study: Study) -> str:
    """Return source and reliability of the published numbers."""
    known = [each for arm in study.arms for each in _published(study, arm)]
    if not known:
        return ""
    places = dict.fromkeys(f"{each.place} ({each.sure})" for each in known)
    return f"Published, {known[0].size} on {known[0].corpus} of its own: {'; '.join(places)}."


def _training_note(study: Study) -> str:
    notes = [
        f"The corpus has the checksum {study.corpus_checksum[:12]}. Validation loss: the last at"
        " the training length, nats a token. Minutes, tokens and epochs of a training: means over"
        " runs, on one device, without the start and the measurements."
    ]
    notes += [f"{NOTHING} {name} failed: {error}." for name, error in study.errors.items()]
    risen = study.repeated_too_often()
    if risen:
        notes.append(f"Repeated too often, the validation loss rose again: {'; '.join(risen)}.")
    return " ".join(notes)
