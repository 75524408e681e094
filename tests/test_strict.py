"""Mappings into dataclasses: what is taken, and what is named as wrong."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from dape.errors import UserError
from dape.strict import Holds, build


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
