"""The figure and table of A, B and f(A, B): their lines and cells are the record's."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from dape.evaluate.capture import Row
from dape.evaluate.heads import Head, describe
from dape.evaluate.learned import Layer, LearnedRows, smooth
from dape.evaluate.subject import Subject
from dape.figures.learned import POINTS, draw, note, table

KEYS, FAR = 1000, 100
DISTANCE = np.arange(KEYS)[::-1]
SPANS = np.linspace(0, KEYS, 257).astype(int)


@pytest.fixture
def row():
    """Return a row of a local head, an anti-local one and one that nothing is added to."""
    bias = np.outer([-1.0, -1.0, 0.0], np.log1p(DISTANCE))
    scores = np.random.default_rng(0).normal(size=(3, KEYS))
    change = np.outer([0.5, -3.0, 0.0], bias[0])
    return Row(4, True, scores, bias, scores + bias + change)


@pytest.fixture
def record(row):
    lines = (smooth(values, SPANS) for values in (row.scores, row.bias, row.change))
    return LearnedRows(
        subject=Subject("runs/a", "dape-kerple", FAR, 0, None, 1),
        data="c0ffee",
        split="test",
        document=3,
        length=KEYS,
        query=KEYS - 1,
        far=FAR,
        spans=SPANS.tolist(),
        layers=[Layer(4, True, *lines, describe(row, FAR))],
        provenance={},
    )


def test_the_title_counts_the_query_from_0_as_the_option_does(record):
    title = f", query {record.query:,} of document 3"
    assert record.query == KEYS - 1
    assert draw(record).get_suptitle().endswith(title) and table(record).title.endswith(title)


def test_the_lines_are_means_over_spans_of_keys(record, row):
    panels = draw(record).axes[:3]
    assert [axes.get_title() for axes in panels] == ["scores A", "bias B", "adapter f(A, B)"]
    coarse = SPANS[:: 256 // POINTS]
    for axes, values, edges in zip(
        panels, (row.scores, row.bias, row.change), (coarse, SPANS, SPANS), strict=True
    ):
        *heads, border = axes.get_lines()
        assert len(heads) == 3 and set(border.get_xdata()) == {KEYS - 1 - FAR}
        for head, line in enumerate(heads):
            means = [values[head, a:b].mean() for a, b in pairwise(edges)]
            np.testing.assert_allclose(line.get_ydata(), means, rtol=1e-3, atol=1e-4)
            middles = [(a + b - 1) / 2 for a, b in pairwise(edges)]
            np.testing.assert_allclose(line.get_xdata(), middles)


@pytest.mark.parametrize("keys", [65, 100, 150, 256, 2048])
def test_the_note_has_the_keys_in_a_point_of_the_lines(record, keys):
    """The distance of neighbouring points of the drawn lines, for texts of any length."""
    spans = np.linspace(0, keys, min(256, keys) + 1).astype(int)
    values = np.random.default_rng(0).normal(size=(3, keys))
    layer = replace(
        record.layers[0], **dict.fromkeys(("scores", "bias", "change"), smooth(values, spans))
    )
    found = replace(record, length=keys, query=keys - 1, spans=spans.tolist(), layers=[layer])
    widths = [
        np.median(np.diff(axes.get_lines()[0].get_xdata())).round() for axes in draw(found).axes[:2]
    ]
    assert "{:.0f} of A and {:.0f} of B and f".format(*widths) in note(found)


def test_heads_are_named_beside_the_figure_and_counted_below_the_table(record):
    words = [text.get_text() for text in draw(record).axes[2].texts]
    assert words == ["local\n0", "even\n2", "anti-local\n1"]
    found = table(record)
    assert [row[:2] for row in found.rows] == [
        ["4.0", "local"],
        ["4.1", "anti-local"],
        ["4.2", "even"],
    ]
    assert found.rows[1][-1] == "-1.00" and found.rows[2][2] == "—"
    assert found.note.startswith("3 heads: 1 local, 1 even, 1 anti-local. Far keys are 100 tokens")
    assert "Far keys are 100 tokens or more before the query, 90% of all" in found.note


def test_the_numbers_of_a_head_stand_under_their_names(record):
    head = Head(0, "local", 0.1, 0.2, 0.3, 4.5, with_scores=-0.6, with_bias=0.7)
    found = table(replace(record, layers=[replace(record.layers[0], heads=[head])]))
    assert dict(zip(found.header, found.rows[0], strict=True)) == {
        "layer.head": "4.0",
        "kind": "local",
        "positive logits - A, far": "10%",
        "positive f, far": "20%",
        "attention, far": "30%",
        "mean distance": "4.5",
        "corr(f, A)": "-0.60",
        "corr(f, B)": "+0.70",
    }


def test_the_note_names_the_border_between_near_and_far_keys(record):
    assert "(length trained at: 100 tokens)" in note(record)
    assert "(half of the keys: 500 tokens)" in note(replace(record, far=500))
