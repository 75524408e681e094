"""The table, the figure and the verdicts of an experiment, from what is finished of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

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

TABLE, VERDICTS = "table.md", "verdicts.json"


@dataclass(frozen=True, slots=True)
class Results:
    """What is known of an experiment: its panels, the verdicts, and the command that made them."""

    experiment: Experiment
    panels: tuple[Panel, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def command(self) -> str:
        """Return the command that makes it."""
        return f"dape paper {self.experiment.name}"

    def markdown(self) -> str:
        """Return all tables in GitHub's Markdown."""
        parts = [
            f"# {self.experiment.title}",
            f"Reproduces {self.experiment.shows}: `{self.command}`",
            verdicts_table(self.verdicts).markdown() if self.verdicts else "",
        ]
        for panel in self.panels:
            parts += [f"## {panel.name}", *(each.markdown() for each in panel_tables(panel))]
            if panel.groups:
                parts.append(f"![perplexity over length]({figure_name(panel)})")
        return "\n\n".join(filter(None, parts)) + "\n"

    def write(self) -> None:
        """Write the tables, a figure for each panel, and the verdicts."""
        folder = self.experiment.folder
        folder.mkdir(parents=True, exist_ok=True)
        for panel in self.panels:
            if panel.groups:
                save(over_length(panel.groups), folder / figure_name(panel))
        write_text(folder / TABLE, self.markdown())
        write_json(folder / VERDICTS, [as_record(verdict) for verdict in self.verdicts])


def results(experiment: Experiment, data: Mapping[str, str] | None = None) -> Results:
    """Return what is known of an experiment; `data` holds the folders of corpora by name."""
    found = panels(experiment.cells(data))
    verdicts = tuple(judge(claim, found) for claim in experiment.claims)
    return Results(experiment, tuple(found), verdicts)


def figure_name(panel: Panel) -> str:
    """Return the file name of a panel's figure."""
    return f"{panel.name}.svg"


def panel_tables(panel: Panel) -> list[Table]:
    """Return the perplexities of a panel beside the paper's, and the tests between arms."""
    comparisons = compare(panel.groups) if panel.groups else []
    found = [perplexities(panel)]
    return [*found, tables.significance(comparisons)] if comparisons else found


def perplexities(panel: Panel) -> Table:
    """Return the perplexity of each arm at each length, the paper's under it, and the price."""
    base = tables.results(panel.groups) if panel.groups else None
    lengths = list(panel.groups[0].evaluations[0].lengths) if panel.groups else []
    ours = {row[0]: row[1:] for row in base.rows} if base else {}
    rows = []
    for arm in dict.fromkeys(cell.arm for cell in panel.cells):
        failed = ["0", *[NOTHING] * len(lengths)]
        rows.append([arm, *ours.get(arm, failed), _validation(panel, arm), _price(panel, arm)])
        known = published(arm, panel.corpus, panel.setting.length, panel.setting.size)
        if known:
            rows.append([f"{arm}, published", "", *_published(known, lengths), "", ""])
    return Table(
        title=f"Perplexity by length of the window: {panel.name}",
        header=["arm", *(base.header[1:] if base else ["runs"]), "validation", "GPU minutes"],
        rows=rows,
        note=" ".join(_notes(panel, base.note if base else "")),
    )


def verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    """Return the verdicts, a row for each check, and the outcome with the claim."""
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


def as_record(verdict: Verdict) -> dict[str, object]:
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
        for cell in _cells(panel, arm)
        if record.read(cell).error is None
    ]
    return f"{mean(losses):.4f}" if losses else NOTHING


def _price(panel: Panel, arm: str) -> str:
    return f"{panel.minutes(arm):.1f}"


def _cells(panel: Panel, arm: str) -> list[Cell]:
    return [cell for cell in panel.cells if cell.arm == arm]


def _published(known: Sequence[Published], lengths: Sequence[int]) -> list[str]:
    by_length = {each.length: each for each in known}
    return [tables.number(by_length[n].perplexity) if n in by_length else "" for n in lengths]


def _notes(panel: Panel, first: str) -> list[str]:
    setting = panel.setting
    notes = [
        first,
        f"Trained on {setting.tokens:,} tokens, {panel.epochs:.2f} epochs of a corpus with"
        f" checksum {panel.corpus_checksum[:12]}. Validation: the last loss at the training"
        " length, nats a token. GPU minutes: all commands of the arm.",
    ]
    notes += [f"{NOTHING} {arm} failed: {error}." for arm, error in panel.errors.items()]
    risen = panel.repeated_too_often()
    if risen:
        notes.append(f"Repeated too often, the validation loss rose again: {'; '.join(risen)}.")
    known = [
        each
        for arm in dict.fromkeys(cell.arm for cell in panel.cells)
        for each in published(arm, panel.corpus, setting.length, setting.size)
    ]
    if known:
        places = dict.fromkeys(f"{each.place} ({each.sure})" for each in known)
        notes.append(
            f"Published, {known[0].size} on the paper's own {known[0].corpus}, with about 40 times"
            f" the tokens: {'; '.join(places)}."
        )
    return notes
