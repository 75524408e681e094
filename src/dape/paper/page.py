"""`dape paper report`: a page on all experiments, readable without a network."""

from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from typing import get_args

from dape.figures.report import template_of
from dape.figures.tables import Table, p_value
from dape.paper import chomsky, claims
from dape.paper.cells import once
from dape.paper.claims import Outcome
from dape.paper.record import minutes
from dape.paper.results import Results
from dape.paper.sections import OURS
from dape.text import counted


def page(found: Sequence[Results], beside: Table) -> str:
    """Return the page: verdicts first, then all experiments with results.

    `beside` holds the published numbers and ours.
    """
    verdicts = [verdict for each in found for verdict in each.verdicts]
    counts = Counter(verdict.outcome for verdict in verdicts)
    return template_of(files("dape.paper") / "page.html").render(
        known=[each for each in found if each.cells],
        absent=[each for each in found if not each.cells],
        counts={outcome: counts[outcome] for outcome in get_args(Outcome)},
        minutes=minutes(once(cell for each in found for cell in each.cells)),
        rules="\n".join((each.__doc__ or "").partition("\n\n")[2] for each in (claims, chomsky)),
        beside=beside,
        published=f", {OURS}",
        p_value=p_value,
        counted=counted,
    )
