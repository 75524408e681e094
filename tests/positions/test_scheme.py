"""Schemes: names, what they are made of, and what is refused."""

import pytest

from dape.errors import UserError
from dape.positions import scheme
from dape.positions.adapter import DAPE
from dape.positions.bias import ALiBi, Kerple

DIMENSIONS = {"num_heads": 6, "head_dim": 8, "hidden_size": 48, "train_length": 16}


@pytest.mark.parametrize(
    ("name", "bias", "kernel_size", "inputs"),
    [
        ("nope", None, None, None),
        ("alibi", ALiBi, None, None),
        ("kerple", Kerple, None, None),
        ("dape-alibi", ALiBi, 1, "concat"),
        ("dape-kerple", Kerple, 1, "concat"),
        ("dape3-kerple", Kerple, 3, "concat"),
        ("dape7-alibi", ALiBi, 7, "concat"),
        ("dape-nope", None, 1, "scores"),
        ("dape5-nope", None, 5, "scores"),
    ],
)
def test_a_name_says_what_stands_at_each_place(name, bias, kernel_size, inputs):
    found = scheme.resolve(name)
    assert found.name == name and name in scheme.names()
    built = {place: found.build(place, DIMENSIONS, {}) for place in scheme.PLACES}
    assert built["embedding"] is None and built["rotation"] is None
    assert (built["bias"] and type(built["bias"])) == bias
    adapter = built["adapter"]
    if kernel_size is None:
        assert adapter is None
    else:
        assert type(adapter) is DAPE and adapter.num_heads == 6
        assert (adapter.kernel_size, adapter.inputs) == (kernel_size, inputs)
        # Where there is no bias, f takes H channels instead of 2 H.
        assert adapter.weight_in.shape[1] == (12 if inputs == "concat" else 6)


@pytest.mark.parametrize("name", scheme.names())
def test_every_listed_name_resolves_to_itself(name):
    assert scheme.resolve(name).name == name


def test_options_reach_the_module_of_their_place():
    options = {"adapter": {"hidden": 5, "residual": False}}
    scheme.check("dape3-kerple", options)
    adapter = scheme.resolve("dape3-kerple").build("adapter", DIMENSIONS, options)
    assert (adapter.hidden, adapter.residual, adapter.kernel_size) == (5, False, 3)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("dape-kerpel", "dape-kerple"),
        ("kerpel", "kerple"),
        ("dape-", "dape"),
        ("dape4-alibi", "dape"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, near):
    with pytest.raises(UserError, match=f"unknown scheme '{name}'; did you mean '{near}"):
        scheme.resolve(name)


@pytest.mark.parametrize("name", ["dape", "dape3", "dape-add", "talking-heads"])
def test_an_adapter_without_a_base_is_refused_with_a_base(name):
    with pytest.raises(UserError, match=f"{name}' is an adapter alone; add a base, as {name}-ker"):
        scheme.resolve(name)
    assert scheme.resolve(f"{name}-kerple").adapter is not None


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dape-kerple", {"adaptor": {}}, "did you mean 'adapter'"),
        ("dape-kerple", {"adapter": {"hiden": 3}}, "option of DAPE 'hiden'; did you mean 'hidden'"),
        ("dape-kerple", {"adapter": {"num_heads": 3}}, "unknown option of DAPE 'num_heads'"),
        ("dape-kerple", {"adapter": 32}, "scheme_options.adapter=32 must map"),
        ("kerple", {"adapter": {"hidden": 3}}, "scheme 'kerple' has no adapter"),
        ("dape-nope", {"bias": {}}, "scheme 'dape-nope' has no bias"),
    ],
)
def test_options_nothing_takes_are_refused(name, options, words):
    with pytest.raises(UserError, match=words):
        scheme.check(name, options)
