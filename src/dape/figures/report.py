"""A report on evaluated runs: an HTML file without network use, or Markdown without figures."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dape.evaluate.compare import METRICS, Comparison, Group, compare, paired
from dape.evaluate.record import Evaluation
from dape.figures import curves, tables
from dape.figures.style import save
from dape.figures.tables import Table
from dape.files import read_text
from dape.provenance import INSTALLED
from dape.runs import RunFolder
from dape.text import code_block, markdown, one_line, printable

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure as SVG in base64, with a caption."""

    caption: str
    data: str


@dataclass(frozen=True, slots=True)
class Report:
    """A report on groups of runs; `command` is the command behind the report.

    Only runs whose folder still exists show their training.
    """

    groups: Sequence[Group]
    metric: str
    command: str

    @property
    def title(self) -> str:
        """Return the title."""
        return f"Reading beyond the training length: {', '.join(g.label for g in self.groups)}"

    @property
    def evaluations(self) -> list[Evaluation]:
        """Return the evaluations of all groups."""
        return [each for group in self.groups for each in group.evaluations]

    @property
    def _runs(self) -> list[str]:
        return [each.subject.run for each in self.evaluations]

    def content(self) -> dict[str, Any]:
        """Return the parts of the report common to both formats, in order."""
        comparisons = compare(self.groups)
        records = {run: RunFolder(Path(run)).read_record() for run in self._runs}
        return {
            "findings": findings(self.groups, comparisons),
            "results": tables.results(self.groups, self.metric),
            "tests": tables.significance(comparisons) if comparisons else None,
            "runs": runs_table(self.evaluations, records),
            "commands": commands(self.evaluations, records, self.command),
            "origin": origin(self.evaluations),
        }

    def recipes(self) -> dict[str, str]:
        """Return the recipe of each group's first run, by label."""
        files = {
            group.label: RunFolder(Path(group.evaluations[0].subject.run)).recipe
            for group in self.groups
        }
        return {label: read_text(file) for label, file in files.items() if file.is_file()}

    def html(self) -> str:
        """Return an HTML page that contains figures and recipes."""
        template = template_of(files("dape.figures") / "report.html", finalize=_printable)
        histories = {run: RunFolder(Path(run)).read_metrics() for run in self._runs}
        return template.render(
            title=self.title,
            drawings=drawings(self.groups, self.metric, histories),
            recipes=self.recipes(),
            **self.content(),
        )

    def markdown(self) -> str:
        """Return the findings, tables and origin in GitHub's Markdown."""
        content = self.content()
        shown = [content[name] for name in ("results", "tests", "runs") if content[name]]
        parts = [
            f"# {markdown(self.title)}",
            *map(markdown, content["findings"]),
            *(table.markdown() for table in shown),
            code_block("\n".join(map(one_line, content["commands"]))),
            "\n".join(f"- {name}: {markdown(value)}" for name, value in content["origin"].items()),
        ]
        return "\n\n".join(parts) + "\n"


def template_of(page: Traversable, **options: Any) -> "Template":
    """Return the template in a file of HTML, with `options` of jinja's environment."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, **options)
    environment.filters["drawing"] = embedded
    return environment.from_string(page.read_text(encoding="utf-8"))


def _printable(value: object) -> object:
    """Return a value for a page, without control characters in foreign text."""
    return printable(value) if type(value) is str else value


def findings(groups: Sequence[Group], comparisons: Sequence[Comparison]) -> list[str]:
    """Return the results of the tests at the longest length, a sentence per pair of groups."""
    by_label = {group.label: group for group in groups}
    longest = max(groups[0].evaluations[0].lengths)
    return [
        finding(each, by_label[each.candidate], by_label[each.baseline])
        for each in comparisons
        if each.length == longest
    ]


def finding(comparison: Comparison, candidate: Group, baseline: Group) -> str:
    """Return a comparison at the longest length in words, with perplexities of its runs."""
    candidate, baseline = paired(candidate, baseline)
    length, trained = comparison.length, candidate.train_length
    times = f", {length / trained:g} times the training length" if trained else ""
    ours, theirs = (
        tables.number(group.values("perplexity")[:, -1].mean()) for group in (candidate, baseline)
    )
    sure = [tables.change(comparison)] + [
        f"p {'' if p.startswith('<') else '= '}{p} over {test.pairs} {units}"
        for test, units in (
            (comparison.over_seeds, "seeds"),
            (comparison.over_documents, "documents"),
        )
        if test is not None and (p := tables.p_value(test)) != tables.NOTHING
    ]
    return (
        f"At {length:,} tokens{times}, the perplexity of {candidate.label} is {ours}, "
        f"and of {baseline.label} {theirs} ({', '.join(sure)})."
    )


def drawings(
    groups: Sequence[Group], metric: str, histories: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Drawing]:
    """Return the figures: over length, over context and, with histories, training."""
    several = any(len(group.evaluations) > 1 for group in groups)
    band = " Shaded: one standard deviation over seeds." if several else ""
    drawn = {
        "length": Drawing(
            f"{METRICS[metric].capitalize()} against the length of the window."
            f" Dashed: without an adapter; solid: with one.{band}",
            embedded(curves.over_length(groups, metric)),
        ),
        "context": Drawing(
            "Mean loss of a scored token against the number of tokens of context. Bins of context"
            f" score different tokens, and all lines share the text.{band}",
            embedded(curves.over_context(groups)),
        ),
    }
    if any(histories.values()):
        drawn["training"] = Drawing(
            f"Loss on the training text while learning.{band}",
            embedded(curves.over_training(groups, histories)),
        )
    return drawn


def embedded(figure: "Figure") -> str:
    """Return a figure as SVG in base64."""
    image = BytesIO()
    save(figure, image, format="svg", metadata={"Date": None})
    return base64.b64encode(image.getvalue()).decode()


def runs_table(
    evaluations: Sequence[Evaluation], records: Mapping[str, Mapping[str, Any]]
) -> Table:
    """Return a table of the runs and the cost of their training."""
    rows = []
    for each in evaluations:
        subject = each.subject
        record = records[subject.run]
        rows.append(
            [
                subject.run,
                subject.scheme,
                _shown(subject.seed),
                f"{subject.parameters:,}",
                _shown(subject.train_length),
                _shown(record.get("tokens")),
                _shown(record.get("loss"), ".4f"),
                _shown(record.get("seconds"), ",.0f"),
            ]
        )
    header = ["run", "scheme", "seed", "parameters", "trained at", "tokens", "loss", "seconds"]
    return Table("Runs", header, rows, note="Tokens, last loss and seconds of training.")


def origin(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Return the provenance of the numbers."""
    made = [each.provenance for each in evaluations]
    targets = [each.targets for each in evaluations]
    versions = (", ".join(f"{k} {v}" for k, v in each["versions"].items()) for each in made)
    rows = {
        "corpus checksum": (each.data for each in targets),
        "documents scored": (
            f"{len(each.documents)} of the {each.split} split" for each in targets
        ),
        "seed of their choice": (str(each["seed"]) for each in made),
        "device of the evaluation": (each["device"] for each in made),
        "commit": (each["commit"] or INSTALLED for each in made),
        "versions": versions,
        "time": (each["time"] for each in made),
    }
    return {name: "; ".join(dict.fromkeys(values)) for name, values in rows.items()}


def commands(
    evaluations: Iterable[Evaluation], records: Mapping[str, Mapping[str, Any]], last: str
) -> list[str]:
    """Return the commands for training, evaluation and report, without repetition."""
    trained = [record["command"] for record in records.values() if "command" in record]
    return list(
        dict.fromkeys([*trained, *(each.provenance["command"] for each in evaluations), last])
    )


def _shown(value: int | float | None, form: str = ",") -> str:
    return tables.NOTHING if value is None else f"{value:{form}}"
