"""What is known of an experiment: sections with figures and tables, and verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
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
    panels: tuple[Panel, ...]
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
    found = tuple(panels(ended))
    return Results(
        experiment,
        ended,
        found,
        sections=tuple(map(panel_section, found)),
        verdicts=tuple(judge(claim, found) for claim in experiment.claims),
    )


def panel_section(panel: Panel) -> Section:
    """Return the perplexities of a panel beside the paper's, and the tests between arms."""
    if not panel.groups:
        return Section(panel.name, (trainings(panel),))
    comparisons = compare(panel.groups)
    tested = [tables.significance(comparisons)] if comparisons else []
    shown = (perplexities(panel), *tested, trainings(panel))
    caption = (
        "Perplexity against the length of the window, trained at"
        f" {panel.setting.length:,} tokens. Dashed: without an adapter; solid: with one."
    )
    return Section(panel.name, shown, over_length(panel.groups), caption)


def perplexities(panel: Panel) -> Table:
    """Return the perplexity of each arm at each length, and the published ones under it."""
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
    """Return what the trainings of each arm reached and took, and which of them failed."""
    rows = []
    for arm in panel.arms:
        cells = [cell for cell in panel.cells if cell.arm == arm]
        steps = [cell.record.read_metrics() for cell in cells if cell.name not in panel.errors]
        losses = [each[-1]["validation_loss"] for each in steps]
        speeds = [step["tokens_per_second"] for each in steps for step in each]
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


def verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    """Return the verdicts: a row for each claim and, under it, one for each of its checks."""
    rows = []
    for verdict in verdicts:
        rows.append([f"{verdict.claim.text} ({verdict.claim.place})", verdict.outcome, "", ""])
        rows += [
            [each.number, each.outcome, str(each.seeds), tables.p_value(each.test)]
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


def _published(panel: Panel, arm: str) -> list[Published]:
    return published(arm, panel.corpus, panel.setting.length, panel.setting.size)


def _places(panel: Panel) -> str:
    """Return where the published numbers stand and how sure they are."""
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
