"""Evaluations on disk."""

import json

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


def test_numbers_that_are_not_finite_survive(tmp_path):
    make("nope", [float("inf")], lengths=(128,)).save(tmp_path / "last.json")
    assert load(tmp_path / "last.json").measurements[0].perplexity == float("inf")


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
    with pytest.raises(UserError, match=rf"last\.json .*{name} is {value!r}"):
        load(path)
