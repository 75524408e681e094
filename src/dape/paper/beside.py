"""Every published number beside ours, as far as measured."""

from collections.abc import Iterable

import numpy as np

from dape.figures.tables import NOTHING, Table, number
from dape.paper.cells import Cell, once
from dape.paper.published import PUBLISHED, Published
from dape.paper.study import Study, studies

CORPORA = ("arxiv", "books")


def beside(ended: Iterable[Cell]) -> Table:
    """Return the published numbers by row, and the means of ours over seeds.

    Cells of several experiments in a regime form a single study, with all arms and seeds.
    """
    found = studies(once(ended))
    rows = [
        [
            f"{each.scheme}, {each.size}, {each.corpus}",
            f"{each.trained:,}",
            f"{each.length:,}",
            number(each.perplexity),
            "; ".join(_ours(each, found)) or NOTHING,
            each.place,
            each.sure,
        ]
        for each in PUBLISHED
    ]
    return Table(
        "Published numbers and ours",
        ["scheme, size, corpus", "trained at", "read at", "theirs", "ours", "place", "how sure"],
        rows,
        note="Perplexity by the protocol last. Ours are of other texts and of fewer tokens. The"
        " orders and the ratios can be compared, the levels cannot.",
    )


def _ours(each: Published, found: Iterable[Study]) -> list[str]:
    """Return our means at the same training length, for all our sizes.

    The means come from the corresponding corpus, or from every corpus without a correspondence. A
    length refused by a run has no mean, as in the tables.
    """
    values = []
    for study in found:
        group = study.group(each.scheme)
        like = each.corpus == study.corpus or each.corpus not in CORPORA
        if group and like and study.regime.length == each.trained:
            measured = [e.by_length.get(each.length) for e in group.evaluations]
            known = [m.perplexity for m in measured if m is not None]
            if len(known) == len(measured):
                values.append(f"{number(float(np.mean(known)))} ({study.name})")
    return values
