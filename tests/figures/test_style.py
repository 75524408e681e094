"""Colours, dashes and markers."""

import matplotlib

from dape.figures.style import DASHED, ENCODINGS, MARKERS, looks, theme
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
