"""The grid of cells, the claims on it, its tables and its figures."""

import math
from dataclasses import replace

import pytest
from cells import cell, small
from scipy.stats import t as student

from dape.chomsky.grid import Grid, arrange, gather, p_value
from dape.errors import UserError
from dape.figures import chomsky as figures

SCHEMES = ("alibi", "kerple", "dape-alibi", "dape-kerple")
# Scores of two seeds, by task and scheme.
SCORES = {
    "even-pairs": ([50, 51], [60, 62], [70, 70.5], [55, 66]),
    "odds-first": ([50, 50], [60, 60.5], [49, 49.5], [80, 80.5]),
    "bucket-sort": ([91, 92], [93, 93], [99, 99.5], [98, 98]),
}


@pytest.fixture
def grid():
    cells = {
        (task, scheme): [
            cell(task, scheme, seed, [100.0, 98.0, score - 1.0, score + 1.0])
            for seed, score in enumerate(scores)
        ]
        for task, row in SCORES.items()
        for scheme, scores in zip(SCHEMES, row, strict=True)
    }
    return Grid(tuple(SCORES), SCHEMES, cells)


def test_p_values_are_welchs(grid):
    # Means 50.5 and 70.25, variances 0.5 and 0.125, two seeds each.
    statistic = 19.75 / (0.25 + 0.0625) ** 0.5
    freedom = (0.25 + 0.0625) ** 2 / (0.25**2 + 0.0625**2)
    expected = 2 * student.sf(statistic, freedom)
    assert p_value(grid, "even-pairs", "alibi", "dape-alibi") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # Means 100 and 91, variances 0 and 1, three seeds each: t = 9 sqrt(3), with 2 degrees.
        ([100, 100, 100], [90, 91, 92], 2 * student.sf(9 * 3**0.5, 2)),
        ([90, 91, 92], [100, 100, 100], 2 * student.sf(9 * 3**0.5, 2)),
        ([100, 100], [50, 50], math.nan),
        ([100], [50, 51, 52], math.nan),
        ([50, 51, 52], [100], math.nan),
    ],
)
def test_a_side_without_spread_is_tested_and_a_single_seed_is_not(first, second, expected):
    made = [
        cell("even-pairs", scheme, seed, [0.0, 0.0, float(score), float(score)])
        for scheme, scores in (("alibi", first), ("kerple", second))
        for seed, score in enumerate(scores)
    ]
    found = arrange(("even-pairs",), ("alibi", "kerple"), made)
    assert p_value(found, "even-pairs", "alibi", "kerple") == pytest.approx(expected, nan_ok=True)


def test_the_score_of_a_scheme_is_the_mean_over_seeds():
    made = [cell("even-pairs", "alibi", n, [0.0, 0.0, x]) for n, x in enumerate((90.0, 91.0, 95.0))]
    found = arrange(("even-pairs",), ("alibi",), made)
    assert found.mean("even-pairs", "alibi") == pytest.approx(92)
    assert math.isnan(found.mean("odds-first", "alibi"))
    unlike = [cell("even-pairs", "alibi", n, [x, x, 0.0]) for n, x in enumerate((90.0, 94.0, 95.0))]
    (row,) = figures.within(arrange(("even-pairs",), ("alibi",), unlike)).rows
    assert row[3:] == ["93.0 (0.250)"]


def test_cells_of_an_installed_package_name_no_commit(grid):
    for cells in grid.cells.values():
        for each in cells:
            each.provenance["commit"] = None
    assert " model steps a device second. Commit installed package; " in figures.made(grid)


def test_tables_hold_mean_deviation_maximum_and_what_needs_no_reading(grid):
    page = figures.page(grid, ["chomsky", "table"])
    assert "| even-pairs | 50.0 | 50.0 | 50.5 ± 0.7 | 61.0 ± 1.4 |" in page
    assert "| bucket-sort* | 20.0 | 90.1 | 91.5 ± 0.7 | 93.0 ± 0.0 |" in page
    assert "| even-pairs | 50.0 | 50.0 | 51.0 | 62.0 | 70.5 | 66.0 |" in page
    assert "| odds-first | 50.0 | 50.0 | 99.0 (0.250) |" in page
    lengths = "constant, blind: without reading the input, means over the lengths 41 to 500."
    assert page.count(lengths) == page.count("| task | constant | blind |") == 3
    assert "lengths 3 to 4" in page and "from memory, unverified" in page
    # 24 models of 6 + 3 seconds; 6 steps in 6 seconds each.
    assert "24 models" in page and "0.06 device hours on a GPU; 1 model steps a" in page


def test_the_heat_map_writes_scores_and_colours_gains(grid):
    (axes, _) = figures.heat_map(grid).axes
    texts = [text.get_text() for text in axes.texts]
    assert texts[:4] == ["50", "61", "70", "60"] and texts[-2:] == ["99", "98"]
    values = axes.collections[0].get_array().ravel()
    assert values[-2] == pytest.approx((99.25 - 90.1) / 9.9)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SCORES)


def test_a_panel_for_each_task_shades_the_lengths_of_training(grid):
    figure = figures.over_length(grid)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == list(SCORES)
    (shade,) = (patch for patch in panels[0].patches)
    assert shade.get_x() == 1 and shade.get_x() + shade.get_width() == 2
    # Sorting without reading: the constant answer is dotted, and the blind predictor is dashed.
    levels = {line.get_linestyle(): line.get_ydata()[0] for line in panels[2].lines[:2]}
    assert levels == {":": pytest.approx(20), "--": pytest.approx(90.1, abs=0.05)}
    lines = [line for line in panels[0].lines if len(line.get_xdata()) == 1]
    # One bin of four lengths: (100 + 98 + 49.5 + 51.5) / 4, the mean of two seeds.
    assert lines[0].get_xdata()[0] == 2.5
    assert lines[0].get_ydata()[0] == pytest.approx((198 + 2 * 50.5) / 4)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(SCHEMES)


def test_the_training_curve_shows_every_point(grid):
    figure = figures.over_training(grid)
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [3, 6]
    assert line.get_ydata().tolist() == pytest.approx([0.7, 0.25])


def test_files_of_a_partial_benchmark(tmp_path):
    benchmark = small(tmp_path, tasks=("even-pairs", "bucket-sort"), schemes=("kerple", "alibi"))
    with pytest.raises(UserError, match="has no finished cell"):
        gather(benchmark)
    for seed in (0, 1):
        cell("even-pairs", "kerple", seed, [100.0] * 4 + [50.0] * 5, trained=4).save(tmp_path)
    written = figures.write(benchmark, ["chomsky", "table"])
    assert [file.name for file in written] == [
        *("recipe.yaml", "table.md", "scores.svg", "lengths.svg", "training.svg")
    ]
    assert "| bucket-sort* | 20.0 | 90.1 | — | — |" in (tmp_path / "table.md").read_text()
    assert all(file.read_text().startswith("<?xml") for file in written[2:])
    other = replace(benchmark, training=replace(benchmark.training, dropout=0.5))
    with pytest.raises(UserError, match=r"training\.dropout=0\.5 \(was 0\.1\)"):
        gather(other)
