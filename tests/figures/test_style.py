"""Colours, dashes and markers."""

import matplotlib
from matplotlib.figure import Figure

from dape.figures.style import DASHED, ENCODINGS, MARKERS, looks, palette, save, theme
from dape.positions.scheme import ADAPTERS, BASES, SCHEMES


def test_every_encoding_and_adapter_has_its_own_looks():
    chosen = looks({name: name for name in SCHEMES})
    seen = {
        (chosen["palette"][name], chosen["dashes"][name], chosen["markers"][name])
        for name in SCHEMES
    }
    assert len(seen) == len(SCHEMES)
    assert set(ENCODINGS) == set(BASES)
    assert set(MARKERS) == set(ADAPTERS)


def test_a_scheme_looks_the_same_whatever_is_drawn_beside_it():
    alone = looks({"dape-fire": "dape-fire"})
    together = looks({name: name for name in ("kerple", "dape3-kerple", "fire", "dape-fire")})
    assert all(alone[part]["dape-fire"] == together[part]["dape-fire"] for part in alone)
    assert together["palette"]["fire"] == together["palette"]["dape-fire"]


def test_labels_of_one_scheme_and_unknown_models_differ_in_colour():
    labels = {"kerple (a)": "kerple", "kerple (b)": "kerple", "llama": "llama", "gpt2": "gpt2"}
    assert len(set(looks(labels)["palette"].values())) == 4


def test_the_order_of_the_labels_changes_no_colour():
    """A legend in the order of the results would give the colour of FIRE to a variant of FIRE."""
    arms = {"fire-l128": "fire", "fire": "fire", "dape-fire-l128": "dape-fire"}
    chosen = looks(arms)
    assert chosen == looks(dict(reversed(arms.items())))
    assert chosen["palette"]["fire"] == palette()[ENCODINGS.index("fire")]


def test_arms_of_an_unknown_model_have_bright_colours_each_its_own():
    schemes = {"as-it-is": "llama", "plain": "llama fine-tuned", "rope": "rope"}
    chosen = looks({**schemes, "dape": "llama + dape-kerple", "blind": "llama + dape-kerple"})
    assert len(set(chosen["palette"].values())) == 5
    assert set(chosen["palette"].values()) <= set(palette()[:10])
    assert chosen["palette"]["rope"] == palette()[ENCODINGS.index("rope")]


def test_pretrained_models_are_solid_only_with_adapters_in_the_colour_of_their_encoding():
    names = ("rope", "rope fine-tuned", "yarn fine-tuned", "rope + dape-kerple", "yarn + dape3")
    chosen = looks({name: name for name in names})
    dashed = [name for name in names if chosen["dashes"][name] == DASHED]
    assert dashed == ["rope", "rope fine-tuned", "yarn fine-tuned"]
    assert chosen["palette"]["rope"] == chosen["palette"]["rope + dape-kerple"]
    assert chosen["palette"]["rope"] != chosen["palette"]["rope fine-tuned"]
    assert chosen["markers"]["yarn + dape3"] == MARKERS["dape3"]


def test_more_labels_than_colours_are_still_drawn():
    assert len(looks({str(n): "kerple" for n in range(25)})["palette"]) == 25


def test_the_theme_ends_where_it_is_used():
    before = matplotlib.rcParams["grid.color"]
    with theme():
        assert matplotlib.rcParams["grid.color"] != before
    assert matplotlib.rcParams["grid.color"] == before


def test_a_figure_that_is_drawn_again_is_the_same_file(tmp_path, monkeypatch):
    files = []
    for epoch in (1, 2):  # what the date of a file is taken from, if it has one
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(epoch))
        figure = Figure()
        figure.subplots().plot([1, 2])
        files.append(tmp_path / f"{epoch}.svg")
        save(figure, files[-1])
    assert files[0].read_bytes() == files[1].read_bytes()
