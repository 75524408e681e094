"""Scores of lm-eval as a table."""

from collections.abc import Sequence

from dape.evaluate.request import Harnessed, Score
from dape.figures.tables import NOTHING, Table, tokenizers
from dape.text import counted


def table(results: Sequence[Harnessed]) -> Table:
    """Return the metrics of runs and tasks by the largest number of tokens in a request."""
    lengths = sorted({each.max_length for each in results})
    cells: dict[tuple[str, str, str], dict[int, str]] = {}
    for each in results:
        for score in each.scores:
            row = cells.setdefault((each.subject.run, each.task, score.metric), {})
            row[each.max_length] = cell(score)
    notes = ["Columns: number of last tokens kept of a request (max_length).", *tokenizers(results)]
    notes += [
        f"{each.subject.run}, {each.task} at {each.max_length:,}: lm-eval cut"
        f" {counted(each.cut, 'request')}."
        for each in results
        if each.cut
    ]
    notes += [
        f"{NOTHING} {each.subject.run}, {each.task} at {each.max_length:,}: {each.refused}."
        for each in results
        if each.refused
    ]
    return Table(
        title="Tasks of lm-eval",
        header=["run", "task", "metric", *(f"{length:,}" for length in lengths)],
        rows=[
            [*names, *(row.get(length, NOTHING) for length in lengths)]
            for names, row in cells.items()
        ],
        note=" ".join(notes),
    )


def cell(score: Score) -> str:
    """Return a metric, with the standard error if known."""
    error = "" if score.error is None else f" ± {score.error:.2g}"
    return f"{score.value:.4g}{error}"
