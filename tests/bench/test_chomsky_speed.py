"""`benchmarks/chomsky_speed.py --prices`: what it measures, and the plan's prices from it."""

import json
from dataclasses import replace

import pytest

from dape.paper.chomsky_experiment import CHOMSKY
from dape.paper.encoders import STEPS

TASKS = {"cycle-navigation", "stack-manipulation", "duplicate-string"}


@pytest.fixture
def price(benchmarks, monkeypatch, tmp_path):
    """Return a function that measures, and returns the file and the pairs measured."""
    module, made = benchmarks("chomsky_speed"), []

    def stacked(task, model, scheme, *rest):
        made.append((task.name, scheme))
        return lambda length: None

    monkeypatch.setattr(module, "stacked", stacked)
    monkeypatch.setattr(module, "sweep", lambda *_: 60.0)
    file = tmp_path / "chomsky" / "speed.json"

    def price(*words):
        made.clear()
        module.main(["--prices", str(file), "--device", "cpu", "--steps", "1", *words])
        return file, set(made)

    return price


def test_prices_of_some_schemes_are_completed_by_others(price):
    assert price("--schemes", "kerple")[1] == {(task, "kerple") for task in TASKS}
    assert price("--schemes", "kerple,alibi")[1] == {(task, "alibi") for task in TASKS}
    assert len(price()[1]) == 3 * 9, "all other schemes of the experiment"
    assert price()[1] == set()


@pytest.mark.parametrize("other", [("--length", "3"), ("--batch-size", "2"), ("--width", "16")])
def test_prices_of_other_settings_are_measured_again(price, other):
    price("--schemes", "kerple")
    file, made = price("--schemes", "kerple", *other)
    assert len(made) == 3 and len(json.loads(file.read_text())["prices"]) == 3


def test_the_plan_takes_the_prices(price):
    file, _ = price("--schemes", "kerple")
    prices = {each["task"]: each for each in json.loads(file.read_text())["prices"]}
    cells = {cell.name: cell for cell in replace(CHOMSKY, home=file.parent).cells()}
    for cell, task, tasks in (
        ("duplicate-string/kerple", "duplicate-string", 1),
        ("regular/kerple", "cycle-navigation", 4),
    ):
        each = prices[task]
        seconds = tasks * (each["start"] + STEPS * each["step"] + 3 * 60.0)
        assert cells[cell].minutes == pytest.approx(seconds / 60)
    assert cells["regular/alibi"].minutes is None
