"""Pictures of encodings: what is drawn, read back from the axes, against the papers' formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import dape
import textbook
from dape.errors import UserError
from dape.figures.encodings import draw
from dape.figures.view import View
from dape.positions.adapter import TransformerXL
from dape.positions.bias import FIRE
from dape.positions.scheme import BASES, PLACES

LENGTH, TRAINED = 24, 8
VIEW = View(heads=3, head_dim=8, train_length=TRAINED, length=LENGTH, seed=5)
DISTANCE = np.arange(LENGTH)
NOTHING = {"nope", "cope"}


def lines(axes):
    """Return the values of each line over the distances 0, 1, ..."""
    found = {line.get_label(): line for line in axes.lines if len(line.get_xdata()) > 2}
    for line in found.values():
        np.testing.assert_array_equal(line.get_xdata(), range(len(line.get_ydata())))
    return {label: line.get_ydata() for label, line in found.items()}


def by_head(axes):
    drawn = lines(axes)
    assert list(drawn) == [f"head {head}" for head in range(1, VIEW.heads + 1)]
    return np.stack(list(drawn.values()))


def matrix(axes):
    """Return a map whose rows are queries: no key after its query may be seen."""
    (mesh,) = axes.collections
    values = mesh.get_array()
    np.testing.assert_array_equal(values.mask, np.triu(np.ones(values.shape, dtype=bool), 1))
    assert axes.yaxis_inverted()
    return values


def waves(axes):
    (mesh,) = axes.collections
    return np.asarray(mesh.get_array())


def relative(values):
    """Return the matrix whose entries are the `values` of the distance."""
    distance = np.subtract.outer(DISTANCE, DISTANCE)
    return np.ma.masked_array(values[np.abs(distance)], distance < 0)


def rope(width):
    return 10000.0 ** (-2 * np.arange(width // 2) / width)


def caption(figure):
    return " ".join(figure.get_supxlabel().split())


def seeded():
    torch.manual_seed(VIEW.seed)


def numbers(module):
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def test_alibi():
    first, *maps = draw("alibi", VIEW).axes
    expected = textbook.alibi(textbook.alibi_slopes(3))(torch.arange(LENGTH)).numpy()
    np.testing.assert_allclose(by_head(first), expected)
    assert [each.get_title() for each in maps] == [f"$B$, head {head}" for head in (1, 2, 3)]
    for each, values in zip(maps, expected, strict=True):
        np.testing.assert_allclose(matrix(each), relative(values))


def test_kerple_at_its_seeded_start():
    seeded()
    bias = dape.Kerple(num_heads=3)
    first, *maps = draw("kerple", VIEW).axes
    expected = textbook.kerple(bias.p.double(), bias.a.double())(torch.arange(LENGTH))
    np.testing.assert_allclose(by_head(first), expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(matrix(maps[2]), relative(expected[2].detach().numpy()), rtol=1e-5)


def test_sandwich():
    angles = DISTANCE[:, None] * rope(128)
    expected = np.cos(angles).sum(1) * 3 / (8 * np.arange(1, 4)[:, None])
    first, *_ = draw("sandwich", VIEW).axes
    np.testing.assert_allclose(by_head(first), expected, rtol=1e-5)


def test_fire_of_the_last_query_and_of_all():
    seeded()
    p = numbers(FIRE(num_heads=3, train_length=TRAINED))

    def expected(head, i, j):
        ratio = math.log(1 + 0.1 * (i - j)) / math.log(1 + 0.1 * max(i, TRAINED))
        hidden = np.maximum(p["weight_in"][:, 0] * ratio + p["bias_in"], 0)
        return p["weight_out"][head] @ hidden + p["bias_out"][head]

    figure = draw("fire", VIEW)
    first, *maps = figure.axes
    last = LENGTH - 1
    for head, line in enumerate(by_head(first)):
        np.testing.assert_allclose(
            line, [expected(head, last, last - d) for d in DISTANCE], rtol=1e-4, atol=1e-6
        )
    for i, j in ((3, 1), (TRAINED, 0), (20, 13)):
        assert matrix(maps[1])[i, j] == pytest.approx(expected(1, i, j), abs=1e-6)
    assert "Lines show the last query." in caption(figure)


def test_the_form_of_dape_that_sees_the_bias_alone_is_drawn_below_it():
    seeded()
    bias, adapter = dape.Kerple(num_heads=3), dape.DAPE(num_heads=3, inputs="bias")
    p = numbers(adapter)
    b = textbook.kerple(bias.p.double(), bias.a.double())(torch.arange(LENGTH)).detach().numpy()
    hidden = p["weight_in"][:, :, 0] @ b + p["bias_in"][:, None]
    hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    expected = b + p["weight_out"][:, :, 0] @ hidden + p["bias_out"][:, None]
    axes = draw("dape-bias-kerple", VIEW).axes
    np.testing.assert_allclose(by_head(axes[0]), b, rtol=1e-5)
    np.testing.assert_allclose(by_head(axes[4]), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(matrix(axes[6]), relative(expected[1]), rtol=1e-4, atol=1e-6)


def test_what_depends_on_the_scores_is_left_out_and_said():
    alone, adapted = draw("alibi", VIEW), draw("dape-alibi", VIEW)
    np.testing.assert_array_equal(by_head(adapted.axes[0]), by_head(alone.axes[0]))
    assert len(adapted.axes) == len(alone.axes)
    assert "The adapter dape depends on the scores and is not drawn." in caption(adapted)
    assert "not drawn" not in caption(alone)
    assert "last query" not in caption(alone)


def test_transformer_xl_without_queries_and_keys():
    seeded()
    p = numbers(TransformerXL(num_heads=3, head_dim=8, hidden_size=24))
    angles = DISTANCE[:, None] * rope(24)
    r = np.concatenate((np.sin(angles), np.cos(angles)), axis=1)
    expected = np.einsum("hd,hdc,tc->ht", p["v"], p["weight"], r) / math.sqrt(8)
    first, *maps = draw("transformer-xl", VIEW).axes
    np.testing.assert_allclose(by_head(first), expected, atol=1e-8)
    np.testing.assert_allclose(matrix(maps[0]), relative(expected[0]), atol=1e-8)


def test_rope_as_the_score_of_ones_and_of_each_pair():
    cosines = np.cos(DISTANCE[:, None] * rope(8))
    first, pairs, score = draw("rope", VIEW).axes
    np.testing.assert_allclose(lines(first)["rope"], cosines.mean(1))
    np.testing.assert_allclose(waves(pairs), cosines.T)
    np.testing.assert_allclose(matrix(score), relative(cosines.mean(1)))


def test_dimensions_that_do_not_turn_are_in_the_score_but_are_no_pairs():
    cosines = np.cos(DISTANCE[:, None] * rope(2))
    figure = draw("partial-rope", VIEW)
    first, pairs, _ = figure.axes
    np.testing.assert_allclose(lines(first)["partial-rope"], (2 * cosines[:, 0] + 6) / 8)
    np.testing.assert_allclose(waves(pairs), cosines.T)
    assert "fraction = 0.25" in caption(figure)


def test_variants_are_drawn_beside_rope():
    angles = DISTANCE[:, None] * rope(8)
    z = (2 * np.arange(4) / 8 + 0.4) / 1.4
    expected = {
        "pi": np.cos(angles / 16),
        "xpos": z ** (DISTANCE[:, None] / 512) * np.cos(angles),
        "dape-rope": np.cos(angles),
    }
    for name, each in expected.items():
        drawn = lines(draw(name, VIEW).axes[0])
        np.testing.assert_allclose(drawn[name.removeprefix("dape-")], each.mean(1))
        np.testing.assert_allclose(drawn["rope"], np.cos(angles).mean(1))
    temperature = lines(draw("yarn", VIEW).axes[0])["yarn"][0]
    assert temperature == pytest.approx((0.1 * math.log(16) + 1) ** 2)


def test_dynamic_ntk_depends_on_the_query_past_the_training_length():
    base = 10000 * (LENGTH / TRAINED) ** (8 / 6)
    own = (LENGTH - 1) * base ** (-2 * np.arange(4) / 8)
    figure = draw("dynamic-ntk", VIEW)
    first, _, score = figure.axes
    assert lines(first)["dynamic-ntk"][-1] == pytest.approx(np.cos(own).mean())
    assert "Lines show the last query." in caption(figure)
    assert matrix(score)[-1, 0] == pytest.approx(np.cos(own).mean())
    assert matrix(score)[7, 4] == pytest.approx(np.cos(3 * rope(8)).mean())


def test_randomised_positions_are_drawn_as_in_evaluation_and_once_as_in_training():
    drawn = lines(draw("randomized-rope", VIEW).axes[0])
    np.testing.assert_allclose(
        drawn["randomized-rope"], np.cos(DISTANCE[:, None] * rope(8)).mean(1)
    )
    seeded()
    positions = torch.randperm(4 * TRAINED)[:TRAINED].sort().values.numpy()
    distance = positions[-1] - positions[::-1]
    expected = np.cos(distance[:, None] * rope(8)).mean(1)
    np.testing.assert_allclose(drawn["a draw in training"], expected)


def test_sinusoids_and_the_cosines_between_them():
    first, vectors, cosine = draw("sinusoidal", VIEW).axes
    angles = DISTANCE[:, None] * rope(24)
    expected = np.cos(angles).mean(1)
    np.testing.assert_allclose(lines(first)["sinusoidal"], expected)
    np.testing.assert_allclose(matrix(cosine), relative(expected))
    np.testing.assert_allclose(waves(vectors), np.sin(angles).T, atol=1e-12)


def test_a_learned_table_is_drawn_to_its_end():
    seeded()
    rows = torch.empty(TRAINED, 24).normal_(std=math.sqrt(2 / (5 * 24))).double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    first, vectors, cosine = draw("learned", VIEW).axes
    np.testing.assert_allclose(lines(first)["learned"], (unit @ unit[-1])[::-1])
    np.testing.assert_allclose(matrix(cosine), unit @ unit.T)
    np.testing.assert_allclose(waves(vectors), rows[:, ::2].T)


@pytest.mark.parametrize("name", ["cope", "dape-nope", "dape3-nope", "talking-heads-nope"])
def test_adapters_of_scores_alone_have_no_picture(name):
    with pytest.raises(
        UserError, match=rf"'{name}' cannot be drawn without data.* on the scores alone"
    ):
        draw(name, VIEW)


def test_nope_has_no_picture():
    with pytest.raises(UserError, match=r"'nope'.* no place depends on position"):
        draw("nope", VIEW)


@pytest.mark.parametrize("name", sorted(BASES.keys() - NOTHING))
def test_every_other_base_says_what_it_is_and_how_it_was_made(name):
    base = BASES[name]
    figure = draw(name, VIEW)
    assert figure.get_suptitle() == f"{name} [{base.paper}, {base.year}]"
    assert caption(figure).endswith(f"Reads past the training length: {base.extrapolates}.")
    parts = (getattr(base, place) for place in PLACES)
    modules = [part.build(VIEW.dimensions, {}) for part in parts if part is not None]
    learnable = any(list(module.parameters()) for module in modules)
    assert ("drawn before training, with seed 5" in caption(figure)) == learnable
    knows = {"fire", "yarn", "llama3", "dynamic-ntk", "randomized-rope"}
    marks = [text.get_text() for text in figure.axes[0].texts]
    assert marks == (["$L$ = 8"] if name in knows else [])


def test_the_caption_has_the_formula_and_the_title_both_papers():
    figure = draw("dape3-kerple", VIEW)
    assert "B_h = -p_h log(1 + a_h |i - j|)" in caption(figure)
    assert figure.get_suptitle() == (
        "dape3-kerple: dape3 [Zheng et al. (V2), 2025] on kerple [Chi et al., 2022]"
    )


def test_a_long_matrix_is_sampled_from_the_first_position_to_the_last():
    view = View(heads=1, length=2000)
    _, score = draw("alibi", view).axes
    (mesh,) = score.collections
    values, edges = mesh.get_array(), mesh.get_coordinates()
    assert values.shape == (512, 512)
    middles = (edges[0, 1:-2, 0] + edges[0, 2:-1, 0]) / 2
    assert values[-1, 0] == pytest.approx(-1999 / 256)
    assert values[-1, 256] == pytest.approx(-(1999 - middles[255]) / 256, rel=1e-3)


@pytest.mark.parametrize("name", ["yarn", "sinusoidal"])
def test_heads_of_an_encoding_equal_for_all_heads_are_not_asked_for(name):
    with pytest.raises(UserError, match=f"matrices: {name} is equal for all heads; leave"):
        draw(name, View(heads=2, length=9, matrices=(2,)))


def test_heads_are_chosen():
    axes = draw("alibi", View(heads=8, length=9, matrices=(2, 7))).axes
    assert [each.get_title() for each in axes[1:]] == ["$B$, head 2", "$B$, head 7"]
    assert matrix(axes[2])[8, 0] == pytest.approx(-8 / 128)


def test_distances_are_logarithmic_and_so_are_values_far_from_zero():
    scales = {}
    for name in ("alibi", "kerple"):
        axes = draw(name, View(heads=2, length=512)).axes[0]
        assert axes.get_xscale() == "symlog"
        assert [text.get_text() for text in axes.get_xticklabels()][:4] == ["0", "1", "4", "16"]
        scales[name] = axes.get_yscale()
    assert scales == {"alibi": "asinh", "kerple": "linear"}
    ticks = draw("alibi", View(heads=1, length=10000)).axes[0].get_yticklabels()
    assert [text.get_text() for text in ticks] == ["−10", "−1", "0"]  # noqa: RUF001


@pytest.mark.parametrize("name", ["rope", "sinusoidal"])
def test_a_single_pair_fills_its_map(name):
    """The only angle of a pair of width 2 is the distance itself, or the position."""
    axes = draw(name, View(heads=1, head_dim=2, length=LENGTH)).axes[1]
    (mesh,) = axes.collections
    assert mesh.get_datalim(axes.transData).height == np.ptp(axes.get_ylim()) == 1
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0"]
    wave = np.cos(DISTANCE) if name == "rope" else np.sin(DISTANCE)
    np.testing.assert_allclose(waves(axes), [wave], atol=1e-12)


@pytest.mark.parametrize("length", [9_999, 10_001, 40_000])
def test_numbers_of_maps_do_not_overlap(length):
    figure = draw("xpos", View(heads=1, length=length))
    figure.canvas.draw()
    for axes in figure.axes[:3]:
        boxes = [text.get_window_extent() for text in axes.get_xticklabels()]
        shown = [box for box in boxes if axes.bbox.x0 <= (box.x0 + box.x1) / 2 <= axes.bbox.x1 + 1]
        assert len(shown) > 2
        assert all(a.x1 < b.x0 for a, b in pairwise(shown))


def test_the_seed_decides_and_nothing_outside_is_drawn_from():
    torch.manual_seed(0)
    following = torch.rand(1)
    torch.manual_seed(0)
    first, again = (by_head(draw("kerple", VIEW).axes[0]) for _ in range(2))
    assert torch.equal(torch.rand(1), following)
    np.testing.assert_array_equal(first, again)
    other = View(heads=3, length=LENGTH, seed=6)
    assert not np.allclose(first, by_head(draw("kerple", other).axes[0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 0}, "heads=0 must be at least 1"),
        ({"length": 1}, "length=1 must be at least 2"),
        ({"matrices": (13,)}, "head 13 is not one of 1 to 12"),
    ],
)
def test_what_cannot_be_drawn_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        View(**fields)
