"""The table and the heat map of retrieval: which number stands where, in which colour."""

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import colormaps

from dape.errors import UserError
from dape.evaluate.retrieval import Retrieval
from dape.evaluate.subject import Subject
from dape.evaluate.trials import Cell, Plan
from dape.figures.retrieval import SCALES, heat_map, table

LENGTHS, DEPTHS = (512, 1024), (0.0, 0.5, 1.0)


def make(scheme, exact, seed=0, refused=(), task="passkey", trials=10):
    """Return a retrieval with these fractions [depth][length]; all else follows from them."""
    cells = [
        Cell(length, depth, share, share / 2, 1 + 9 * (1 - share), 10 * (share - 1))
        for depth, row in zip(DEPTHS, exact, strict=True)
        for length, share in zip(LENGTHS, row, strict=True)
        if length not in refused
    ]
    return Retrieval(
        subject=Subject(
            run=f"runs/{scheme}-{seed}",
            scheme=scheme,
            train_length=512,
            seed=seed,
            settings=scheme,
            parameters=10,
        ),
        task=task,
        data=None,
        plan=Plan(LENGTHS, DEPTHS, trials, seed=0),
        cells=cells,
        refused={length: "it ends" for length in refused},
        provenance={},
    )


KERPLE = make("kerple", [[0.8, 0.0], [0.9, 0.2], [1.0, 1.0]])
OTHER_SEED = make("kerple", [[0.6, 0.2], [0.9, 0.4], [1.0, 0.8]], seed=1)
LEARNED = make("learned", [[0.1, 0.0], [0.2, 0.0], [0.3, 0.0]], refused=(1024,))


def test_the_table_has_a_row_for_each_depth_with_the_mean_over_seeds():
    shown = table([KERPLE, LEARNED, OTHER_SEED])
    assert shown.header == ["scheme", "runs", "depth", "512", "1,024"]
    assert shown.rows == [
        ["kerple", "2", "0", "70%", "10%"],
        ["kerple", "2", "0.5", "90%", "30%"],
        ["kerple", "2", "1", "100%", "90%"],
        ["learned", "1", "0", "10%", "—"],
        ["learned", "1", "0.5", "20%", "—"],
        ["learned", "1", "1", "30%", "—"],
    ]
    assert "A number of 5 digits" in shown.note and "10 numbers at each" in shown.note
    once = table([make("kerple", [[1.0, 0.0]] * 3, trials=1)])
    assert "; 1 number at each length and depth, " in once.note
    assert shown.note.endswith("— learned refused 1,024 tokens: it ends.")


def test_models_with_different_tokenizers_are_named():
    one, two = replace(KERPLE, tokenizer="c0ffee"), replace(LEARNED, tokenizer="beef")
    words, axis = "The models have different tokenizers", "(tokens, of different tokenizers)"
    assert words in table([one, two]).note
    assert axis in heat_map([one, two]).get_supxlabel()
    # Records of earlier versions name no tokenizer.
    for alike in ([one, OTHER_SEED], [one, replace(two, tokenizer="c0ffee")]):
        assert words not in table(alike).note
    assert heat_map([one, OTHER_SEED]).get_supxlabel() == "length of the text (tokens)"


def panels(figure):
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_title()]


def test_each_cell_of_the_map_says_its_number_in_the_colour_of_the_scale():
    first, second = panels(heat_map([KERPLE, LEARNED, OTHER_SEED]))
    assert first.get_title() == "kerple, trained at 512"
    assert [text.get_text() for text in first.texts] == ["70%", "10%", "90%", "30%", "100%", "90%"]
    (mesh,) = first.collections
    values = np.array([[0.7, 0.1], [0.9, 0.3], [1.0, 0.9]])
    assert np.asarray(mesh.get_array()) == pytest.approx(values)
    first.figure.draw_without_rendering()
    expected = colormaps["viridis"](values.ravel())
    assert mesh.get_facecolors() == pytest.approx(expected)
    assert [label.get_text() for label in first.get_xticklabels()] == ["512", "1,024"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0%", "50%", "100%"]
    assert first.yaxis_inverted()  # the beginning of the text is above
    assert [text.get_text() for text in second.texts] == ["10%", "20%", "30%"]
    assert second.collections[0].get_array().mask[:, 1].all()
    assert second.figure.get_supxlabel().endswith("grey: refused")


def test_all_panels_share_one_scale_and_a_better_rank_is_brighter():
    first, second = panels(heat_map([KERPLE, LEARNED], "rank"))
    norms = [panel.collections[0].norm for panel in (first, second)]
    assert norms[0] is norms[1] and (norms[0].vmin, norms[0].vmax) == (1, 10)
    colours = colormaps[SCALES["rank"].colours](norms[0]([1.0, math.sqrt(10), 10.0]))
    assert colours == pytest.approx(colormaps["viridis"]([1.0, 0.5, 0.0]), abs=0.02)
    (panel,) = panels(heat_map([KERPLE], "log_probability"))
    norm = panel.collections[0].norm
    assert (norm.vmin, norm.vmax) == (-10, 0), "from the least value to the greatest possible"


def luminance(colour):
    """Return the relative luminance of sRGB, as WCAG 2 defines it."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return linear[..., :3] @ (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize("metric", SCALES)
def test_colours_differ_in_lightness_alone_if_need_be(metric):
    """Whoever sees no hue still reads the order."""
    steps = luminance(colormaps[SCALES[metric].colours](np.linspace(0, 1, 32)))
    assert (np.diff(steps) > 0).all() or (np.diff(steps) < 0).all()


@pytest.mark.parametrize("metric", SCALES)
def test_a_model_that_refused_all_is_a_map_without_numbers(metric):
    figure = heat_map([make("learned", [[0.0] * 2] * 3, refused=LENGTHS)], metric)
    figure.draw_without_rendering()
    assert len(panels(figure)[0].texts) == 0


@pytest.mark.parametrize("other", [{"task": "needle"}, {"trials": 20}])
def test_what_was_asked_otherwise_is_not_drawn_together(other):
    with pytest.raises(UserError, match="had different prompts"):
        heat_map([KERPLE, make("alibi", [[0.0] * 2] * 3, **other)])
