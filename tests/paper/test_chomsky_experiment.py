"""The Chomsky benchmark as an experiment: its cells, price, sections and verdicts."""

import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from laboratory import enter
from scipy.special import comb
from scipy.stats import t as student

from dape import cli
from dape.chomsky.benchmark import SCHEMES, Benchmark
from dape.chomsky.cell import Cell, path
from dape.chomsky.tasks import TASKS
from dape.cli import chomsky_map, chomsky_train
from dape.cli.arguments import parse
from dape.errors import UserError
from dape.paper import encoders, record
from dape.paper.chomsky import Above, BestOf, Near, grids
from dape.paper.chomsky_experiment import CHOMSKY
from dape.paper.encoders import GROUPS, Encoders
from dape.paper.experiment import smoke
from dape.paper.page import page
from dape.paper.plan import plan, table
from dape.paper.results import results
from dape.paper.spread import Workers, spread
from evaluations import PROVENANCE

CELLS, SETTINGS = CHOMSKY.cells(), Benchmark().settings()
VARYING = [name for name, task in TASKS.items() if not task.permutable]


@pytest.fixture(autouse=True)
def laboratory(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)


class Here(Workers):
    """Workers that run a command in this process."""

    def call(self, words, device, log):
        return cli.main(list(words))


def test_every_task_scheme_and_seed_is_trained_once():
    kept = [file for cell in CELLS for file in cell.commands[0].keeps if "cells" in str(file)]
    every = product(TASKS, SCHEMES, (0, 1, 2))
    assert sorted(map(str, kept)) == sorted(f"cells/{t}/{s}-{seed}.json" for t, s, seed in every)


@pytest.mark.parametrize("name", ["regular/dape-kerple", "bucket-sort/kerple"])
def test_a_command_trains_as_the_recipe_says(name):
    (cell,) = [each for each in CELLS if each.name == name]
    chomsky, train, *words = cell.commands[0].words
    assert (chomsky, train) == ("chomsky", "train")
    arguments = chomsky_train.read_arguments(words, "", chomsky_train.Arguments)
    benchmark = arguments.benchmark
    expected = {**SETTINGS, "training": {**SETTINGS["training"], "steps": 10_000}}
    assert benchmark.settings() == expected
    assert benchmark.folder == cell.run.path and benchmark.schemes == (cell.arm,)
    assert arguments.together == len(benchmark.tasks) == (4 if "regular" in name else 1)
    for command in cell.commands[1:]:
        chosen = parse(chomsky_map.Arguments, command.words[2:], "dape chomsky map")
        assert chosen.folder == cell.run.path and chosen.scheme == cell.arm
        assert chosen.task in benchmark.tasks
        assert chosen.out == tuple(cell.run.path / kept for kept in command.keeps)
    assert len(cell.commands) == 2


def test_the_recipe_is_read_once_for_all_cells(monkeypatch):
    """Each reading checks every scheme on every task."""
    read, files = encoders.read, []
    monkeypatch.setattr(encoders, "read", lambda file: files.append(file) or read(file))
    assert len(CHOMSKY.cells()) == 110 and len(files) == 1


def test_a_changed_recipe_changes_the_cells(tmp_path):
    """Records of the earlier rate do not stand for the later one, which nothing else would tell."""
    (cell,) = [each for each in CELLS if each.name == "bucket-sort/alibi"]
    for seed in (0, 1, 2):
        save("bucket-sort", "alibi", seed, 90.0)
    cell.record.record.write_text("{}")
    record.finish(cell, {str(cell.commands[0]): 1.0}, None)
    assert [each.state for each in plan([cell])] == ["finished"]
    text = Path("recipes/chomsky.yaml").read_text()
    Path("recipes").unlink()
    Path("recipes").mkdir()
    for name, value in (
        ("learning_rate: 3.0e-4", "learning_rate: 1.0e-3"),
        ("samples: 128", "samples: 64"),
    ):
        assert text.count(name) == 1
        Path("recipes/chomsky.yaml").write_text(text.replace(name, value))
        (same,) = [each for each in CHOMSKY.cells() if each.name == cell.name]
        assert [each.state for each in plan([same])] == ["changed"]


def test_in_miniature_from_the_cells_to_the_page():
    tiny = smoke(CHOMSKY)
    (part,) = tiny.parts
    tiny = replace(tiny, parts=(replace(part, schemes=("kerple", "dape-kerple")),))
    ends = spread(tiny.cells(), ["cpu"], Here(), lambda line: None)
    assert [end.error for end in ends] == [None, None]
    assert [each.state for each in plan(tiny.cells())] == ["finished"] * 2
    found = results(tiny)
    names = [section.name for section in found.sections]
    maps = ["map-parity-check-kerple", "map-parity-check-dape-kerple"]
    assert names == ["scores", "lengths", "training", *maps]
    assert found.sections[0].tables[0].rows[0][:3] == ["parity-check*", "50.0", "50.0"]
    assert found.origin()["device"].startswith("cpu") and "torch" in found.origin()["versions"]
    found.write()
    assert (tiny.folder / "scores.svg").is_file() and "![" in (tiny.folder / "table.md").read_text()
    html = page([found], found.sections[0].tables[1])
    assert "map-parity-check-dape-kerple" in html and "<svg" not in html


def save(task, scheme, seed, score, **training):
    """Put a finished cell into the record of the one that would train it."""
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "length": 2, **training}}
    made = Cell(
        *(task, scheme, seed, settings, 10, [(1, 0.5)], [100.0, 100.0, score]),
        seconds={"training": 1.0, "evaluation": 1.0},
        models=1,
        provenance=PROVENANCE,
    )
    (cell,) = [each for each in CELLS if each.arm == scheme and task in each.commands[0].words]
    file = path(cell.record.path, task, scheme, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(made)))
    return cell


def evidence(scores, **training):
    """Return the grid of scores by scheme, task and seed."""
    ended = {
        cell.name: cell
        for scheme, rows in scores.items()
        for task, values in rows.items()
        for seed, value in enumerate(values)
        for cell in [save(task, scheme, seed, value, **training)]
    }
    return grids(list(ended.values()))


def test_a_scheme_is_above_another_by_the_sign_test_over_tasks():
    """On 11 of 12 tasks, and clearly on one, where the seeds do not overlap."""
    base = {task: [50.0, 52.0] for task in VARYING}
    better = {task: [51.0, 52.0] for task in VARYING} | {VARYING[0]: [70.0, 70.5]}
    better[VARYING[1]] = [49.0, 50.0]
    permutable = [task for task in TASKS if task not in VARYING]
    base |= {task: [70.0, 71.0] for task in permutable}  # these do not count
    better |= {task: [50.0, 51.0] for task in permutable}
    found = Above("dape-kerple", "kerple", "10 of 11").find(
        evidence({"kerple": base, "dape-kerple": better})
    )
    assert found.number.startswith("dape-kerple above kerple on 11 of 12 tasks, clearly on 1,")
    tail = sum(comb(12, k) for k in (11, 12)) / 2**12
    assert found.test.p_value == pytest.approx(2 * tail)
    assert found.outcome == "reproduced" and found.seeds == 2 and found.test.pairs == 12
    assert found.test.difference == pytest.approx((10 * 0.5 + 19.25 - 1.5) / 12)
    assert Above("dape-fire", "fire", "").find(grids([])) is None


def test_below_on_most_tasks_is_not_reproduced_and_half_is_open():
    base = {task: [50.0] for task in VARYING}
    worse = {task: [49.0] for task in VARYING}
    check = Above("dape-kerple", "kerple", "")
    assert check.find(evidence({"kerple": base, "dape-kerple": worse})).outcome == "not reproduced"
    mixed = {task: [49.0 + 2 * (n % 2)] for n, task in enumerate(VARYING)}
    found = check.find(evidence({"kerple": base, "dape-kerple": mixed}))
    assert found.outcome == "not decidable at this scale" and found.test.p_value == 1
    assert "on 6 of 12 tasks" in found.number


@pytest.mark.parametrize(("score", "outcome"), [(99.0, "reproduced"), (101.0, "not reproduced")])
def test_tasks_of_equal_scores_are_left_out_of_the_sign_test(score, outcome):
    """Six of twelve tasks differ, all to one side: 2 / 2^6 = 0.03."""
    solved = {task: [100.0] for task in VARYING}
    base = solved | {task: [score] for task in VARYING[:6]}
    found = Above("dape-kerple", "kerple", "").find(
        evidence({"kerple": base, "dape-kerple": solved})
    )
    assert found.test.p_value == pytest.approx(2 / 2**6) and found.outcome == outcome
    assert f"on {6 if score < 100 else 0} of 12 tasks" in found.number


def test_a_dape_is_best_on_more_tasks_than_by_chance():
    """One of three schemes, best on 9 of 12: all outcomes as unlikely as that, or more."""
    low, high = {task: [50.0] for task in VARYING}, {task: [51.0] for task in VARYING}
    found = BestOf("10 of 11").find(
        evidence(
            {"kerple": low, "alibi": low, "dape-kerple": high | {key: [1.0] for key in VARYING[:3]}}
        )
    )
    chances = np.array([comb(12, k) * (1 / 3) ** k * (2 / 3) ** (12 - k) for k in range(13)])
    expected = chances[chances <= chances[9] * (1 + 1e-7)].sum()
    assert found.test.p_value == pytest.approx(expected) and found.outcome == "reproduced"
    assert "best on 9 of 12 tasks, 1 of 3 schemes" in found.number


def test_half_of_the_tasks_is_more_than_an_equal_chance_among_five():
    """DAPE V2 is a DAPE too, and a task of a single seed makes the number of seeds one."""
    others = {scheme: {task: [50.0] for task in VARYING} for scheme in ("rope", "alibi", "fire")}
    best = {task: [60.0, 61.0] for task in VARYING[:6]} | {task: [40.0] for task in VARYING[6:]}
    kerple = {task: [50.0 + (n >= 6)] for n, task in enumerate(VARYING)}
    found = BestOf("").find(evidence({**others, "kerple": kerple, "dape3-kerple": best}))
    chances = np.array([comb(12, k) * 0.2**k * 0.8 ** (12 - k) for k in range(13)])
    expected = chances[chances <= chances[6] * (1 + 1e-7)].sum()
    assert found.test.p_value == pytest.approx(expected) and found.outcome == "reproduced"
    assert "best on 6 of 12 tasks, 1 of 5 schemes" in found.number and found.seeds == 1
    found = Above("dape3-kerple", "kerple", "").find(
        evidence({"kerple": kerple, "dape3-kerple": best})
    )
    assert found.seeds == 1


@pytest.mark.parametrize("order", [("kerple", "dape-kerple"), ("dape-kerple", "kerple")])
def test_tasks_that_both_sides_solve_decide_nothing(order):
    """Two scores of 100 have no winner, whichever scheme comes first."""
    level = {scheme: {task: [100.0] for task in VARYING} for scheme in order}
    found = BestOf("").find(evidence(level))
    assert found.outcome == "not decidable at this scale" and found.test.p_value == 1
    assert "best on 0 of 12 tasks, level on 12, 1 of 2 schemes" in found.number
    level["kerple"] |= {task: [90.0] for task in VARYING[:7]}
    found = BestOf("").find(evidence(level))
    assert found.test.pairs == 7 and found.test.p_value == pytest.approx(2 / 2**7)
    assert "best on 7 of 12 tasks, level on 5" in found.number and found.outcome == "reproduced"


@pytest.mark.parametrize(
    ("values", "edge", "outcome"),
    [
        ([50.0, 50.4, 50.2], -2.0, "reproduced"),
        ([60.0, 60.4, 60.2], 2.0, "not reproduced"),
        ([49.0, 53.0, 50.0], 2.0, "not decidable at this scale"),
    ],
)
def test_a_score_is_near_a_published_one_by_t_tests_at_the_edges(values, edge, outcome):
    found = Near("parity-check", "dape-alibi", 50.3).find(
        evidence({"dape-alibi": {"parity-check": values}})
    )
    mean, deviation = np.mean(values), np.std(values, ddof=1) / 3**0.5
    assert found.test.p_value == pytest.approx(
        student.sf(abs(mean - 50.3 - edge) / deviation, df=2)
    )
    assert found.outcome == outcome and "blind to the input: 50.0" in found.number
    assert found.test.difference == pytest.approx(mean - 50.3)


def test_cells_of_other_settings_do_not_mix():
    evidence({"kerple": {"even-pairs": [50.0]}})
    save("even-pairs", "alibi", 0, 50.0, steps=7)
    with pytest.raises(
        UserError, match=r"kerple, seed 0 was made with training\.steps=50000 \(was 7"
    ):
        grids(CELLS)


def test_the_price_is_that_of_the_measured_task_with_the_next_longer_output():
    part = Encoders({"all": ("even-pairs", "odds-first", "duplicate-string")}, ("kerple", "fire"))
    home = Path("results/chomsky")
    assert [cell.minutes for cell in part.cells(home, {})] == [None, None]
    home.mkdir(parents=True)
    prices = [
        {"task": task, "scheme": "kerple", "models": models, "start": 2, "step": step, "test": 10}
        for task, models, step in (
            ("parity-check", 3, 0.001),
            ("binary-addition", 3, 0.002),
            ("binary-addition", 9, 1.0),
        )
    ]
    (home / "speed.json").write_text(json.dumps({"prices": prices}))
    kerple, fire = part.cells(home, {})
    # Odds First is priced as the one symbol longer Binary Addition, the longest as that too.
    assert kerple.minutes == pytest.approx((3 * 2 + 10_000 * 0.005 + 3 * 30) / 60)
    assert fire.minutes is None
    assert "no price was measured" in table(plan([fire]), 1).note
    assert "no price" not in table(plan([kerple]), 1).note
    assert "~" not in table(plan([kerple]), 1).note, "the price follows from measured steps"
    rows = table(plan(CHOMSKY.cells()), 1).rows
    assert [row[0] for row in rows] == [*GROUPS, "all"] and rows[0][3] == "11", "missing"
