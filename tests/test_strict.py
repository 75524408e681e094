"""Mappings into dataclasses: what is taken, and what is named as wrong."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from dape.bench import record as bench
from dape.chomsky import maps
from dape.errors import UserError
from dape.evaluate import learned
from dape.evaluate import trials as retrieval
from dape.evaluate.context import Tally
from dape.evaluate.heads import Head
from dape.evaluate.request import Score
from dape.files import as_json
from dape.strict import Holds, Number, build


@dataclass(frozen=True)
class Part:
    size: int
    weight: float | None = None


@dataclass(frozen=True)
class Whole:
    name: str
    parts: list[Part]
    pairs: list[tuple[int, float]] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    lines: dict[str, list[list[float]]] = field(default_factory=dict)
    one: Part | None = None
    kind: Literal["a", "b"] = "a"
    origin: Annotated[dict[str, Any], Holds({"time": str})] = field(
        default_factory=lambda: {"time": ""}
    )


LEAST = {"name": "x", "parts": []}


@dataclass(frozen=True)
class Measured:
    best: Number
    pairs: list[tuple[int, Number]]
    lines: dict[str, list[list[Number]]]


def test_a_number_may_be_null_where_none_exists_and_is_nan_then():
    found = build(
        Measured, {"best": None, "pairs": [[1, None], [2, 3]], "lines": {"a": [[None, 1]]}}
    )
    numbers = [found.best, *(y for _, y in found.pairs), *found.lines["a"][0]]
    assert np.isnan(numbers).tolist() == [True, True, False, True, False]
    assert all(type(each) is float for each in numbers)
    for wrong in ("nan", True, [1.0]):
        with pytest.raises(UserError, match=r"best=.*expected a number"):
            build(Measured, {"best": wrong, "pairs": [], "lines": {}})


RECORDS = [
    (Tally, {"tokens": [[1]], "losses": [[[None]]]}),
    (Score, {"metric": "acc", "value": None, "error": None}),
    (bench.Check, {"method": "", "length": 1, "direction": "", "batch": 1, "checked": 1,
                   "errors": {"out": None}}),
    (retrieval.Cell, {"length": 1, "depth": 0.0, "exact": 0.0, "accuracy": 0.0, "rank": 1.0,
                      "log_probability": None}),
    (learned.Layer, {"layer": 0, "residual": True, "scores": [[None]], "bias": [[None]],
                     "change": [[None]], "heads": []}),
    (Head, {"head": 0, "kind": "even", "attention_far": None, "centre": None,
            **dict.fromkeys(("positive_far", "change_far", "with_scores", "with_bias"))}),
    (maps.Layer, {"residual": True, "with_scores": None, "with_bias": None,
                  "spread": {"bias": None},
                  **{key: [[None]] for key in ("scores", "bias", "change", "weights")}}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "data"), RECORDS)
def test_numbers_of_a_broken_model_are_read_again(kind, data):
    """A model with weights that are NaN, say, in each record that has its numbers."""
    found = asdict(build(kind, data))
    assert "nan" in repr(found) and as_json(found) == as_json(asdict(build(kind, found)))


def test_what_json_holds_becomes_what_the_types_say():
    found = build(
        Whole,
        {
            "name": "x",
            "parts": [{"size": 1}, {"size": 2, "weight": 3}],
            "pairs": [[1, 2], [3, 4.5]],
            "reasons": {"7": "too long"},
            "lines": {"a": [[1, 2.5], []]},
            "one": {"size": 3},
            "origin": {"time": "now", "more": [1]},
        },
    )
    assert found == Whole(
        name="x",
        parts=[Part(1), Part(2, 3.0)],
        pairs=[(1, 2.0), (3, 4.5)],
        reasons={7: "too long"},
        lines={"a": [[1.0, 2.5], []]},
        one=Part(3),
        origin={"time": "now", "more": [1]},
    )
    assert type(found.parts[1].weight) is float


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "name=None: expected text"),
        ({"parts": None}, "parts=None: expected a list"),
        ({"parts": [{}]}, "parts.size is missing"),
        ({"parts": [3]}, "parts=3 must be a section of keys"),
        ({"parts": [{"size": "a"}]}, "parts.size='a': expected a whole number"),
        ({"parts": [{"size": True}]}, "parts.size=True: expected a whole number"),
        ({"parts": [{"size": 1, "wait": 2}]}, "unknown key 'parts.wait'"),
        ({"pairs": [[1]]}, r"pairs=\[1\]: expected a list of 2 numbers"),
        ({"pairs": [[1, None]]}, "pairs=None: expected a number"),
        ({"lines": {"a": [["b"]]}}, "lines.a='b': expected a number"),
        ({"reasons": {"7": 8}}, "reasons.7=8: expected text"),
        ({"reasons": {"seven": "a"}}, "reasons.seven: expected a whole number as key"),
        ({"kind": "c"}, "kind='c': expected 'a' or 'b'"),
        ({"one": []}, r"one=\[\]: expected a section of keys or nothing"),
        ({"origin": {}}, "origin.time is missing"),
        ({"origin": {"time": 3}}, "origin.time=3: expected text"),
        ({"origin": "a"}, "origin='a': expected a mapping"),
    ],
)
def test_what_is_of_another_type_is_named(changes, message):
    build(Whole, LEAST)
    with pytest.raises(UserError, match=f"^{message}"):
        build(Whole, LEAST | changes)


def test_a_field_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"^parts is missing"):
        build(Whole, {"name": "x"})


def test_a_whole_number_beyond_all_floats_is_infinite():
    assert build(Part, {"size": 1, "weight": -(10**400)}).weight == float("-inf")
