"""Evaluations on disk."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from dape.errors import UserError
from dape.evaluate.record import load
from dape.runs import RunFolder
from evaluations import make


def test_what_is_saved_is_what_is_loaded(tmp_path):
    evaluation = make("kerple", [2.0, 1.9, 1.8, 1.7, 1.6])
    path = tmp_path / "evaluation" / "last.json"
    evaluation.save(path)
    assert load(path) == evaluation
    assert [file.name for file in path.parent.iterdir()] == ["last.json"]


def test_a_refused_length_is_kept_with_its_reason_and_is_plain_json(tmp_path):
    evaluation = make("learned", [2.0, None], lengths=(128, 256))
    path = tmp_path / "last.json"
    evaluation.save(path)
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["refused"] == {"256": "256 is too long"}
    assert [each["length"] for each in content["measurements"]] == [128]
    assert load(path) == evaluation
    assert load(path).lengths == [128, 256]


def test_a_file_that_knows_of_no_refusals_has_none(tmp_path):
    evaluation = make("kerple", [2.0], lengths=(128,))
    path = tmp_path / "last.json"
    evaluation.save(path)
    content = json.loads(path.read_text())
    del content["refused"]
    path.write_text(json.dumps(content))
    assert load(path) == evaluation


def test_a_number_that_is_not_finite_is_null_in_the_file(tmp_path):
    """A perplexity beyond all numbers follows from the loss; a loss that is not finite is NaN."""
    path, lengths = tmp_path / "last.json", (128, 256, 512)
    made = make("nope", [800.0, math.inf, math.nan], lengths=lengths)
    first, *broken = made.measurements
    lost = {"loss_error": math.nan, "bits_per_byte": math.nan}
    replace(made, measurements=[first, *(replace(each, **lost) for each in broken)]).save(path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    large, *nothing = load(path).measurements
    assert large == first and large.perplexity == math.inf
    for each in nothing:
        numbers = [each.loss, each.perplexity, *each.document_losses, each.contexts[0][2]]
        assert len(numbers) == 23 and np.isnan(numbers).all()
        assert (each.loss_error, each.bits_per_byte) == (None, None)


def test_a_file_of_an_earlier_version_holds_numbers_that_are_not_finite(tmp_path):
    path = tmp_path / "last.json"
    made = make("nope", [math.inf], lengths=(128,))
    made.save(path)
    content = json.loads(path.read_text())
    content["measurements"] = [asdict(each) for each in made.measurements]
    path.write_text(json.dumps(content))
    assert "Infinity" in path.read_text() and load(path) == made


@pytest.mark.parametrize("name", ["loss_error", "bits_per_byte"])
def test_a_number_may_be_absent_with_the_loss_alone(tmp_path, name):
    made = make("kerple", [2.0], lengths=(128,))
    with pytest.raises(UserError, match=name):
        replace(made, measurements=[replace(made.measurements[0], **{name: None})])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("last", None, "test"), "last.json"),
        (("sliding", 64, "validation"), "sliding-64-validation.json"),
    ],
)
def test_the_name_of_the_file_tells_protocol_stride_and_split(tmp_path, arguments, name):
    assert RunFolder(tmp_path).evaluation(*arguments) == tmp_path / "evaluation" / name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the evaluation is missing; run `dape eval`"),
        ("{", "not JSON"),
        (json.dumps({"format": 0}), "no evaluation of format 1"),
        ("[]", "no JSON object"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "last.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        load(path)


def places(content, path=()):
    """Yield the path to each value in JSON, mappings and lists themselves included."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for name, value in items:
        yield (*path, name)
        if isinstance(value, dict | list):
            yield from places(value, (*path, name))


def test_no_field_may_be_missing_null_or_of_another_kind(tmp_path):
    """At each place of a file but those that may be none, and that the package never reads."""
    path = tmp_path / "last.json"
    made = make("kerple", [2.0, None], lengths=(128, 256))
    made.save(path)
    text = path.read_text()
    accepted = set()
    for place in places(json.loads(text)):
        for value in (None, [1], {"a": "b"}):
            content = json.loads(text)
            *outer, name = place
            inner = content
            for each in outer:
                inner = inner[each]
            inner[name] = value
            path.write_text(json.dumps(content))
            try:
                load(path)
                accepted.add((place, repr(value)))
            except UserError:
                pass
    assert accepted == {
        *((("measurements", 0, name), "None") for name in ("loss", "perplexity")),
        *((("measurements", 0, "document_losses", n), "None") for n in range(20)),
        (("measurements", 0, "contexts", 0, 2), "None"),
        (("weights",), "None"),
        (("trained_on",), "None"),
        (("provenance", "commit"), "None"),
        (("provenance", "versions"), "{'a': 'b'}"),
        *((("provenance", "seed"), repr(value)) for value in (None, [1], {"a": "b"})),
    }


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (None, "seed", "some text"),
        (None, "scheme", 3),
        (None, "parameters", None),
        ("targets", "split", None),
        ("measurements", "loss", "low"),
        ("measurements", "length", 1.5),
    ],
)
def test_a_field_of_another_kind_is_damage(tmp_path, part, name, value):
    path = tmp_path / "last.json"
    make("kerple", [2.0], lengths=(128,)).save(path)
    content = json.loads(path.read_text())
    place = {None: content, "measurements": content["measurements"][0]}.get(part, content.get(part))
    place[name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"last\.json: .*{name}={value!r}: expected"):
        load(path)
