"""Public names say what they are, and what each of their arguments is."""

import inspect
import re

import pytest

import dape

PUBLIC = [
    pytest.param(getattr(package, name), id=name)
    for package in (dape, dape.train, dape.evaluate)
    for name in package.__all__
    if name != "UserError"
]
POINTING = r"(What|Those|That|Of|So|It|This|These|Which|Such|There|Where)\b"


def arguments(named):
    """Return the names to explain; fields of a recipe have docstrings of their own below them."""
    if named is dape.DapeConfig:  # without those of transformers
        return set(vars(named)["__annotations__"]) - {"keys_to_ignore_at_inference", "model_type"}
    if named in (dape.train.Recipe, dape.train.Retrofit):
        return set()
    return set(inspect.signature(named).parameters) - {"args", "kwargs"}


@pytest.mark.parametrize("named", PUBLIC)
def test_every_argument_has_a_line(named):
    text = inspect.getdoc(named)
    listed = set(re.findall(r"^ +(\w+): ", text, flags=re.MULTILINE))
    if "`dape.evaluate.evaluate` explains" in text:
        listed |= arguments(dape.evaluate.evaluate)
    assert arguments(named) <= listed


@pytest.mark.parametrize("named", PUBLIC)
def test_no_sentence_begins_with_a_pointing_word(named):
    text = re.sub(r"`[^`]*`", "CODE", inspect.getdoc(named))
    sentences = re.split(r"(?<=[.?!])\s+|\n\n", text)
    assert not [each for each in sentences if re.match(POINTING, each)]
