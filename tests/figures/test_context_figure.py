"""The figure and tables of the use of the context: their marks and cells are the gains."""

from dataclasses import replace

import numpy as np
import pytest

from dape.evaluate.context import ContextUse, Tally
from dape.evaluate.gains import by_adapter, by_length
from dape.figures.context import draw, tables
from evaluations import make

LENGTHS = [128, 256]
TOKENS = [[60, 40, 70], [30, 50, 20], [0, 0, 0]]


def use(scheme, seed, documents=3):
    """Return a record of random losses; no token occurs nowhere, and pairs are in other bins."""
    rng = np.random.default_rng(seed)
    bins = {"token": TOKENS, "pair": TOKENS[::-1]}
    tokens = {name: [row[:documents] for row in rows] for name, rows in bins.items()}
    losses = {name: rng.uniform(1, 3, (2, 3, documents)) * rows for name, rows in tokens.items()}
    evaluation = make(scheme, [2.0, 1.9], lengths=LENGTHS, documents=documents)
    return ContextUse(
        subject=evaluation.subject,
        targets=evaluation.targets,
        lengths=LENGTHS,
        positions=[(1, 1, 4.0), (2, 4, 3.0), (5, 256, 2.5)],
        tallies={name: Tally(tokens[name], losses[name].tolist()) for name in bins},
        provenance={},
    )


@pytest.fixture
def records():
    return [use("kerple", 0), use("dape-kerple", 1)]


def marks(axes, label):
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return line.get_ydata()


def test_the_marks_are_the_gains(records):
    figure = draw(records)
    positions, longer, of_pairs, over_length, adapter, _ = figure.axes
    assert marks(positions, "kerple").tolist() == [4.0, 3.0, 2.5]
    for axes, name in ((longer, "token"), (of_pairs, "pair")):
        for found in by_length(records, name):
            expected = [np.nan if each.mean is None else each.mean for each in found.gains]
            np.testing.assert_allclose(marks(axes, found.label), expected)
    (found,) = by_adapter(records, "token")
    np.testing.assert_allclose(marks(adapter, found.name)[:2], [g.mean for g in found.gains[:2]])
    totals = [by_adapter(records, "token", length)[0].total.mean for length in LENGTHS]
    np.testing.assert_allclose(marks(over_length, found.name), totals)
    bounds = [segment[:, 1].tolist() for segment in adapter.collections[0].get_segments()[:2]]
    assert bounds == [[each.low, each.high] for each in found.gains[:2]]
    ticks = [label.get_text() for label in longer.get_xticklabels()]
    assert ticks == ["128\n(170)", "256\n(100)", "none\n(0)"]


def test_the_losses_by_position_are_means_over_seeds_at_the_middle_of_a_bin(records):
    """The middle is the geometric mean of a bin's ends, and a hollow mark has no adapter."""
    other = use("kerple", 7)
    about = replace(other.subject, seed=1, run="runs/kerple-1")
    losses = [(1, 1, 6.0), (2, 4, 5.0), (5, 256, 3.5)]
    figure = draw([*records, replace(other, subject=about, positions=losses)])
    positions, _, _, over_length, *_ = figure.axes
    plain, adapted = (
        next(line for line in positions.get_lines() if line.get_label() == label)
        for label in ("kerple", "dape-kerple")
    )
    assert plain.get_ydata().tolist() == [5.0, 4.0, 3.0]
    assert adapted.get_ydata().tolist() == [4.0, 3.0, 2.5]
    np.testing.assert_allclose(plain.get_xdata(), np.sqrt([1, 8, 5 * 256]))
    assert plain.get_markerfacecolor() == "white" != adapted.get_markerfacecolor()
    (line,) = [x for x in over_length.get_lines() if x.get_label() == "dape-kerple over kerple"]
    assert line.get_xdata().tolist() == LENGTHS


def test_the_cells_are_the_gains(records):
    first, _, third, _ = tables(records)
    assert first.header == ["last occurrence", "tokens", "kerple", "dape-kerple"]
    assert [row[:2] for row in first.rows] == [
        *(["within 128", "170"], ["128 to 256", "100"], ["nowhere", "0"], ["all", "270"])
    ]
    assert first.rows[2][2:] == ["—", "—"]
    (found,) = by_adapter(records, "token")
    total = found.total
    cell = f"{total.mean:+.3f} [{total.low:+.3f}, {total.high:+.3f}]"
    assert third.rows[-1] == ["all", "270", cell]


def test_a_table_has_the_tokens_and_the_gains_of_its_kind_of_occurrence(records):
    """By the sums of the records: what the long window or the adapter saves, a token."""
    by_name = {name: [each.tallies[name] for each in records] for name in ("token", "pair")}
    for name, shown in zip(("token", "pair") * 2, found := tables(records), strict=True):
        tokens = np.array(by_name[name][0].tokens).sum(axis=1)
        base, adapted = (np.array(each.losses).sum(axis=2) for each in by_name[name])
        saved = (
            [base[1] - adapted[1]] if shown in found[2:] else [x[0] - x[1] for x in (base, adapted)]
        )
        assert [row[1] for row in shown.rows] == [f"{n}" for n in (*tokens, tokens.sum())]
        for column, each in enumerate(saved):
            cells = [row[2 + column].partition(" ")[0] for row in shown.rows]
            means = [f"{x / n:+.3f}" if n else "—" for x, n in zip(each, tokens, strict=True)]
            assert cells == [*means, f"{each.sum() / tokens.sum():+.3f}"]


def test_one_document_has_no_interval():
    records = [use("kerple", 0, documents=1)]
    assert "[" not in tables(records)[0].rows[0][2]
    assert draw([replace(records[0])]).axes


def test_the_gain_of_an_adapter_is_of_the_seeds_on_both_sides(records):
    (expected,) = by_adapter(records, "token")
    about = {"seed": 1, "run": "runs/kerple-1"}
    more = use("kerple", 7)
    more = replace(more, subject=replace(more.subject, **about))
    (found,) = by_adapter([*records, more], "token")
    assert found.total == expected.total and found.gains == expected.gains
