"""What is drawn, read back from the axes."""

import math

import numpy as np
import pytest

from dape.evaluate.compare import group
from dape.figures.curves import over_context, over_length, over_training
from evaluations import LENGTHS, make

KERPLE = [[2.1, 2.0, 2.2, 2.6, 3.5], [2.2, 2.1, 2.3, 2.8, 4.0]]
DAPE = [[2.0, 1.9, 1.8, 1.7, 1.7], [2.1, 1.9, 1.9, 1.8, 1.7]]


def runs(*, seeds=2):
    return group(
        [
            make(scheme, losses[seed], seed=seed)
            for scheme, losses in (("kerple", KERPLE), ("dape-kerple", DAPE))
            for seed in range(seeds)
        ]
    )


def drawn(axes):
    """Return the lines by the label that the legend gives their looks."""
    legend = {
        text.get_text(): handle
        for text, handle in zip(
            axes.get_legend().get_texts(), axes.get_legend().legend_handles, strict=True
        )
    }
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    return {
        label: next(line for line in lines if looks(line) == looks(handle))
        for label, handle in legend.items()
    }


def looks(line):
    return line.get_color(), line.is_dashed(), line.get_marker()


def test_each_scheme_is_a_line_of_the_mean_over_seeds():
    (axes,) = over_length(runs()).axes
    lines = drawn(axes)
    assert list(lines) == ["kerple", "dape-kerple"]
    late = over_length([*runs(), *group([make("alibi", [2.5, 2.5, 2.5, 2.5, 2.5])])])
    assert list(drawn(late.axes[0])) == ["kerple", "alibi", "dape-kerple"], "at the longest length"
    for label, losses in (("kerple", KERPLE), ("dape-kerple", DAPE)):
        np.testing.assert_allclose(lines[label].get_xdata(), LENGTHS)
        np.testing.assert_allclose(lines[label].get_ydata(), np.exp(losses).mean(axis=0))


def test_the_band_is_one_standard_deviation_over_seeds():
    (axes,) = over_length(runs()).axes
    (vertices,) = (path.vertices for path in axes.collections[0].get_paths())
    at_longest = vertices[vertices[:, 0] == LENGTHS[-1]][:, 1]
    values = np.exp(KERPLE)[:, -1]
    assert at_longest.min() == pytest.approx(values.mean() - values.std(ddof=1))
    assert at_longest.max() == pytest.approx(values.mean() + values.std(ddof=1))


def test_one_seed_has_no_band():
    (axes,) = over_length(runs(seeds=1)).axes
    assert not [path for each in axes.collections for path in each.get_paths()]


def test_one_colour_an_encoding_dashed_without_an_adapter_and_solid_with_one():
    lines = drawn(over_length(runs()).axes[0])
    assert lines["kerple"].get_color() == lines["dape-kerple"].get_color()
    assert lines["kerple"].is_dashed()
    assert not lines["dape-kerple"].is_dashed()


def test_lengths_are_on_a_logarithmic_axis_with_the_training_length_marked():
    (axes,) = over_length(runs()).axes
    assert axes.get_xscale() == "log"
    assert axes.xaxis.get_transform().base == 2
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"{n:,}" for n in LENGTHS]
    (mark,) = (line for line in axes.lines if line.get_linestyle() == ":")
    assert set(mark.get_xdata()) == {128}
    assert [text.get_text() for text in axes.texts] == ["trained at 128"]


def test_every_training_length_is_marked():
    longer = make("alibi", [2.0] * 5, settings="longer", train_length=512, run="runs/longer")
    (axes,) = over_length([*runs(), *group([longer])]).axes
    assert [text.get_text() for text in axes.texts] == ["trained at 128", "512"]


@pytest.mark.parametrize(("worst", "scale"), [(3.0, "linear"), (3.5, "log")])
def test_the_value_axis_is_logarithmic_for_ranges_above_four(worst, scale):
    (axes,) = over_length(group([make("kerple", [2.0, 2.0, 2.0, 2.0, worst])])).axes
    assert axes.get_yscale() == scale


def test_a_value_that_is_not_finite_is_left_out():
    groups = group([make("nope", [2.0, 2.1, 2.2, 2.3, math.nan])])
    lines = drawn(over_length(groups).axes[0])
    np.testing.assert_allclose(lines["nope"].get_xdata(), LENGTHS[:-1])


@pytest.mark.parametrize("lost", [None, math.nan, 800.0])
def test_a_mean_over_the_luckier_seeds_is_not_drawn(lost):
    """A seed refused the longest length, or has no finite perplexity there."""
    losses = [KERPLE[0], [*KERPLE[1][:-1], lost]]
    groups = group([make("kerple", each, seed=seed) for seed, each in enumerate(losses)])
    line = drawn(over_length(groups).axes[0])["kerple"]
    np.testing.assert_allclose(line.get_xdata(), LENGTHS[:-1])
    np.testing.assert_allclose(line.get_ydata(), np.exp(KERPLE).mean(axis=0)[:-1])
    line = drawn(over_context(groups).axes[0])["kerple"]
    np.testing.assert_allclose(line.get_ydata()[:4], np.mean(KERPLE, axis=0)[:4])
    assert len(line.get_ydata()) == (5 if lost == 800.0 else 4), "a loss of 800 is finite"


def test_a_refused_length_is_left_out_of_the_line_and_not_of_the_axis():
    learned = [make("learned", [2.0, 2.1, 2.2, None, None], seed=seed) for seed in (0, 1)]
    groups = group([*learned, make("kerple", KERPLE[0])])
    (axes,) = over_length(groups).axes
    lines = drawn(axes)
    assert list(lines) == ["kerple", "learned"]
    np.testing.assert_allclose(lines["learned"].get_xdata(), LENGTHS[:3])
    np.testing.assert_allclose(lines["learned"].get_ydata(), np.exp([2.0, 2.1, 2.2]))
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"{n:,}" for n in LENGTHS]
    assert len(drawn(over_context(groups).axes[0])["learned"].get_xdata()) == 3


def test_models_that_refuse_every_length_leave_an_empty_figure():
    groups = group([make("learned", [None] * 5)])
    for figure in (over_length(groups), over_context(groups)):
        (axes,) = figure.axes
        assert not [line for line in axes.lines if line.get_linestyle() != ":"]


def test_bits_per_byte_are_drawn_when_asked():
    (axes,) = over_length(runs(), "bits_per_byte").axes
    expected = np.mean(DAPE, axis=0) / math.log(2) / 2
    np.testing.assert_allclose(drawn(axes)["dape-kerple"].get_ydata(), expected)
    named = axes.get_xlabel(), axes.get_ylabel()
    assert named == ("length of the window (tokens)", "bits per byte")


def test_loss_by_context_takes_each_bin_from_the_longest_window_that_scores_it():
    evaluation = make("kerple", [2.0, 1.5], lengths=(2, 4))
    both = [[(1, 1, 3.0), (2, 2, 2.0)], [(1, 1, 9.0), (2, 2, 8.0), (3, 4, 1.0)]]
    for measurement, contexts in zip(evaluation.measurements, both, strict=True):
        measurement.contexts[:] = contexts
    (axes,) = over_context(group([evaluation])).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens of context", "loss (nats a token)")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "4"]
    assert [text.get_text() for text in axes.texts] == ["trained at 128"]
    line = drawn(axes)["kerple"]
    np.testing.assert_allclose(line.get_xdata(), [1, 2, math.sqrt(12)])
    np.testing.assert_allclose(line.get_ydata(), [9, 8, 1])


def test_training_loss_is_drawn_over_tokens():
    groups = group([make("kerple", KERPLE[0]), make("dape-kerple", DAPE[0])])
    histories = {
        "runs/kerple-0": [{"tokens": 100 * n, "loss": 5.0 - n} for n in range(1, 4)]
        + [{"tokens": 400, "validation_loss": 2.0}],
        "runs/dape-kerple-0": [{"tokens": 100 * n, "loss": 4.0 - n} for n in range(1, 4)],
    }
    (axes,) = over_training(groups, histories).axes
    named = axes.get_xlabel(), axes.get_ylabel()
    assert named == ("tokens trained on", "training loss (nats a token)")
    lines = drawn(axes)
    np.testing.assert_allclose(lines["kerple"].get_xdata(), [100, 200, 300])
    np.testing.assert_allclose(lines["kerple"].get_ydata(), [4, 3, 2])
    np.testing.assert_allclose(lines["dape-kerple"].get_ydata(), [3, 2, 1])


def test_what_diverges_leaves_the_figure_and_does_not_set_its_scale():
    groups = group(
        [make("alibi", [2.0, 2.1, 2.1, 2.2, 2.2]), make("rope", [2.0, 4.0, 6.0, 8.0, 9.0])]
    )
    (axes,) = over_length(groups, top=20.0).axes
    lowest = math.exp(2)
    assert axes.get_ylim() == pytest.approx((lowest - 0.05 * (20 - lowest), 20.0))
    assert axes.get_yscale() == "linear"
    (axes,) = over_length(groups).axes
    assert axes.get_ylim()[1] > math.exp(9) and axes.get_yscale() == "log"
