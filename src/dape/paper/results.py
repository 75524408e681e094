"""What is known of an experiment: sections with figures and tables, and verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from dape.evaluate.compare import compare
from dape.figures import tables
from dape.figures.curves import over_length
from dape.figures.style import save
from dape.figures.tables import NOTHING, Table
from dape.files import write_json, write_text
from dape.paper import record
from dape.paper.cells import Cell
from dape.paper.claims import Verdict, judge
from dape.paper.experiment import Experiment
from dape.paper.panel import Panel, panels
from dape.paper.published import Published, published

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE, VERDICTS = "table.md", "verdicts.json"
OURS = "published"  # ends the label of a row that is not ours


@dataclass(frozen=True, slots=True)
class Section:
    """Tables that belong together, and their figure."""

    name: str
    tables: tuple[Table, ...]
    figure: "Figure | None" = None
    caption: str = ""

    @property
    def file(self) -> str:
        """Return the name of the figure's file."""
        return f"{self.name}.svg"


@dataclass(frozen=True, slots=True)
class Results:
    """What is known of an experiment: finished or failed cells, sections and verdicts."""

    experiment: Experiment
    cells: tuple[Cell, ...]
    sections: tuple[Section, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def command(self) -> str:
        """Return the command that makes all of it."""
        return f"dape paper {self.experiment.name}"

    @property
    def minutes(self) -> float:
        """Return the GPU minutes that it took."""
        return sum(record.read(cell).minutes for cell in self.cells)

    def origin(self) -> dict[str, str]:
        """Return the devices, commits and versions that the trainings tell of."""
        made = [cell.record.read_record() for cell in self.cells]
        found: dict[str, dict[str, None]] = {"device": {}, "commit": {}, "versions": {}}
        for each in made:
            versions = [f"{name} {number}" for name, number in each.get("versions", {}).items()]
            for name, value in {**each, "versions": ", ".join(versions)}.items():
                if name in found and value:
                    found[name][str(value)] = None
        return {name: "; ".join(values) for name, values in found.items() if values}

    def commands(self) -> list[str]:
        """Return the commands of the cells."""
        return [record.command(step) for cell in self.cells for step in cell.steps]

    def markdown(self) -> str:
        """Return the tables in GitHub's Markdown, with links to the figures."""
        parts = [
            f"# {self.experiment.title}",
            f"Reproduces {self.experiment.shows}: `{self.command}`,"
            f" {self.minutes:.0f} GPU minutes.",
            verdicts_table(self.verdicts).markdown() if self.verdicts else "",
        ]
        for section in self.sections:
            parts += [f"## {section.name}", *(table.markdown() for table in section.tables)]
            if section.figure:
                parts += [f"![{section.caption}]({section.file})", section.caption]
        parts += [f"- {name}: {value}" for name, value in self.origin().items()]
        return "\n\n".join(filter(None, parts)) + "\n"

    def write(self) -> None:
        """Write the tables, the figures and the verdicts into the folder of the experiment."""
        folder = self.experiment.folder
        folder.mkdir(parents=True, exist_ok=True)
        for section in self.sections:
            if section.figure:
                save(section.figure, folder / section.file)
        write_text(folder / TABLE, self.markdown())
        write_json(folder / VERDICTS, [as_record(verdict) for verdict in self.verdicts])


def results(experiment: Experiment, data: Mapping[str, str] | None = None) -> Results:
    """Return what is known of an experiment; `data` holds the folders of corpora by name."""
    cells = experiment.cells(data)
    here = record.checksums(cells)
    ended = tuple(cell for cell in cells if record.state(cell, here) in ("finished", "failed"))
    found = panels(ended)
    return Results(
        experiment,
        ended,
        sections=tuple(map(panel_section, found)),
        verdicts=tuple(judge(claim, found) for claim in experiment.claims),
    )


def panel_section(panel: Panel) -> Section:
    """Return the perplexities of a panel beside the paper's, and the tests between arms."""
    shown = [perplexities(panel)]
    if not panel.groups:
        return Section(panel.name, tuple(shown))
    comparisons = compare(panel.groups)
    if comparisons:
        shown.append(tables.significance(comparisons))
    caption = (
        "Perplexity against the length of the window, trained at"
        f" {panel.setting.length:,} tokens. Dashed: without an adapter; solid: with one."
    )
    return Section(panel.name, tuple(shown), over_length(panel.groups), caption)


def perplexities(panel: Panel) -> Table:
    """Return the perplexity of each arm at each length, the paper's under it, and the price."""
    base = tables.results(panel.groups) if panel.groups else None
    lengths = list(panel.groups[0].evaluations[0].lengths) if panel.groups else []
    ours = {row[0]: row[1:] for row in base.rows} if base else {}
    failed = ["0", *[NOTHING] * len(lengths)]
    rows = []
    for arm in panel.arms:
        rows.append(
            [arm, *ours.get(arm, failed), _validation(panel, arm), f"{panel.minutes(arm):.1f}"]
        )
        known = published(arm, panel.corpus, panel.setting.length, panel.setting.size)
        if known:
            rows.append([f"{arm}, {OURS}", "", *_published(known, lengths), "", ""])
    return Table(
        title=f"Perplexity by length of the window: {panel.name}",
        header=["arm", *(base.header[1:] if base else ["runs"]), "validation", "GPU minutes"],
        rows=rows,
        note=" ".join(filter(None, [base.note if base else "", *_notes(panel)])),
    )


def verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    """Return the verdicts: a row for each claim and, under it, one for each of its checks."""
    rows = []
    for verdict in verdicts:
        rows.append([f"{verdict.claim.text} ({verdict.claim.place})", verdict.outcome, "", ""])
        rows += [
            [each.number, each.outcome, str(each.seeds), f"{each.test.p_value:.2g}"]
            for each in verdict.findings
        ]
    tests = dict.fromkeys(each.test.name for verdict in verdicts for each in verdict.findings)
    note = f"Two-sided p: {'; '.join(tests)}." if tests else "Nothing is measured."
    return Table("Verdicts", ["claim", "outcome", "seeds", "p"], rows, note)


def as_record(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as JSON holds it."""
    return {
        "claim": verdict.claim.text,
        "place": verdict.claim.place,
        "outcome": verdict.outcome,
        "checks": [
            {
                "number": each.number,
                "outcome": each.outcome,
                "seeds": each.seeds,
                "p": each.test.p_value,
                "test": each.test.name,
            }
            for each in verdict.findings
        ],
    }


def _validation(panel: Panel, arm: str) -> str:
    losses = [
        cell.record.read_record()["validation_loss"]
        for cell in panel.cells
        if cell.arm == arm and record.read(cell).error is None
    ]
    return f"{mean(losses):.4f}" if losses else NOTHING


def _published(known: Sequence[Published], lengths: Sequence[int]) -> list[str]:
    by_length = {each.length: each for each in known}
    return [tables.number(by_length[n].perplexity) if n in by_length else "" for n in lengths]


def _notes(panel: Panel) -> list[str]:
    setting = panel.setting
    notes = [
        f"Trained on {setting.tokens:,} tokens, {panel.epochs:.2f} epochs of a corpus with checksum"
        f" {panel.corpus_checksum[:12]}. Validation: the last loss at the training length, nats a"
        " token. GPU minutes: all commands of the arm."
    ]
    notes += [f"{NOTHING} {name} failed: {error}." for name, error in panel.errors.items()]
    risen = panel.repeated_too_often()
    if risen:
        notes.append(f"Repeated too often, the validation loss rose again: {'; '.join(risen)}.")
    known = [
        each
        for arm in panel.arms
        for each in published(arm, panel.corpus, setting.length, setting.size)
    ]
    if known:
        places = dict.fromkeys(f"{each.place} ({each.sure})" for each in known)
        notes.append(
            f"Published, {known[0].size} on {known[0].corpus} of its own: {'; '.join(places)}."
        )
    return notes
