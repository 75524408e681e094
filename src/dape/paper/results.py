"""The results of an experiment: sections with figures and tables, and verdicts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dape.evaluate.significance import FEWEST_DOCUMENTS
from dape.figures.style import save
from dape.figures.tables import NO_P, NOTHING, Table, p_value
from dape.files import write_json, write_text
from dape.paper import chomsky, record, sections
from dape.paper.cells import Cell
from dape.paper.claims import Evidence, Verdict, judge
from dape.paper.experiment import Experiment
from dape.paper.sections import Section
from dape.paper.study import Study, studies
from dape.text import counted

SECTIONS = sections.SECTIONS | chomsky.SECTIONS
TABLE, VERDICTS = "table.md", "verdicts.json"


@dataclass(frozen=True, slots=True)
class Results:
    """The results of an experiment: finished or failed cells, sections and verdicts.

    `planned` is the number of all cells of the experiment.
    """

    experiment: Experiment
    cells: tuple[Cell, ...]
    studies: tuple[Study, ...]
    sections: tuple[Section, ...]
    verdicts: tuple[Verdict, ...]
    planned: int

    @property
    def command(self) -> str:
        """Return the command behind the results."""
        return f"dape paper {self.experiment.name}"

    @property
    def minutes(self) -> float:
        """Return the minutes of a device for the experiment."""
        return record.minutes(self.cells)

    def origin(self) -> dict[str, str]:
        """Return the devices, commits and versions of the trainings."""
        with record.repairable(self.cells):
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
        return [str(command) for cell in self.cells for command in cell.commands]

    def markdown(self) -> str:
        """Return the tables in GitHub's Markdown, with links to the figures."""
        parts = [
            f"# {self.experiment.title}",
            f"Reproduces {self.experiment.shows}: `{self.command}`,"
            f" {counted(round(self.minutes), 'minute')} of a device.",
            verdicts_table(self.verdicts).markdown() if self.verdicts else "",
        ]
        for section in self.sections:
            parts += [f"## {section.name}", *(table.markdown() for table in section.tables)]
            if section.figure:
                parts.append(f"![{section.caption}]({section.file})")
            parts.append(section.caption)
        parts.append("\n".join(f"- {name}: {value}" for name, value in self.origin().items()))
        return "\n\n".join(filter(None, parts)) + "\n"

    def write(self) -> None:
        """Write the tables, the figures and the verdicts into the folder of the experiment."""
        folder = self.experiment.folder
        folder.mkdir(parents=True, exist_ok=True)
        for section in self.sections:
            if section.figure:
                save(section.figure, folder / section.file)
        write_text(folder / TABLE, self.markdown())
        if self.verdicts:
            write_json(folder / VERDICTS, [as_record(verdict) for verdict in self.verdicts])


def results(experiment: Experiment, data: Mapping[str, str] | None = None) -> Results:
    """Return the results so far of an experiment; `data` holds the folders of corpora by name."""
    cells = experiment.cells(data)
    with record.repairable(cells):
        here = record.checksums(cells)
        ended = tuple(cell for cell in cells if record.state(cell, here) in ("finished", "failed"))
        found = tuple(studies(ended))
        evidence: Evidence = (*found, *chomsky.grids(ended))
        return Results(
            experiment,
            ended,
            found,
            tuple(section for name in experiment.sections for section in SECTIONS[name](ended)),
            tuple(judge(claim, evidence) for claim in experiment.claims),
            len(cells),
        )


def verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    """Return the verdicts, with a row for each claim and rows for its checks below."""
    rows = []
    for verdict in verdicts:
        outcome = f"{verdict.outcome} ({verdict.part})" if verdict.part else verdict.outcome
        rows.append([f"{verdict.claim.text} ({verdict.claim.place})", outcome, "", ""])
        rows += [
            [each.number, each.outcome, str(each.seeds), p_value(each.test)]
            for each in verdict.findings
        ]
    found = [each.test for verdict in verdicts for each in verdict.findings]
    tests = dict.fromkeys(test.name for test in found if test)
    note = f"Two-sided p: {'; '.join(tests)}." if tests else "No claim is measured."
    if any(test and test.few for test in found):
        note += f" {NOTHING} fewer than {FEWEST_DOCUMENTS} documents: no p over documents."
    if any(test and not test.few and math.isnan(test.p_value) for test in found):
        note += f" {NO_P}"
    return Table("Verdicts", ["claim", "outcome", "seeds", "p"], rows, note)


def as_record(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict for JSON."""
    return {
        "claim": verdict.claim.text,
        "place": verdict.claim.place,
        "outcome": verdict.outcome,
        "checks": [
            {
                "number": each.number,
                "outcome": each.outcome,
                "seeds": each.seeds,
                "p": each.test.p_value if each.test and not each.test.few else None,
                "test": each.test and each.test.name,
            }
            for each in verdict.findings
        ],
    }
