from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median

import pytest
from laboratory import ROOT, Pretended, cells, enter, sweep

from dape.evaluate.record import load
from dape.files import remove
from dape.paper import record
from dape.paper.beyond import RETROFIT
from dape.paper.cells import Regime
from dape.paper.experiments import ALL, AMOUNTS, CORE, COST, SIZE
from dape.paper.plan import (
    AROUND,
    Planned,
    _estimate,
    choose,
    long_documents,
    pack,
    plan,
    table,
    without_corpus,
)
from dape.paper.smollm2 import SMOLLM2
from dape.paper.spread import spread
from dape.paper.sweep import USES
from dape.train.recipe import override, write


@pytest.fixture(autouse=True)
def laboratory(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)


def run(found, **options):
    return spread(found, ["cpu"], Pretended(**options), lambda line: None)


def states(found):
    return [each.state for each in plan(found)]


def test_a_cell_is_missing_then_finished():
    found = cells()
    assert states(found) == ["missing", "missing"]
    run(found[:1])
    assert states(found) == ["finished", "missing"]
    assert choose(plan(found)) == found[1:]


def test_a_cell_is_finished_where_its_weights_and_its_data_are_not():
    found = cells()
    run(found)
    for folder in ("data", "runs/smoke/smoke-python-stdlib-32-8.19k"):
        Path(folder).rename(Path(folder).with_name("gone"))
    assert states(found) == ["finished", "finished"]


def test_other_settings_other_data_and_other_measurements_are_run_again():
    found = cells("kerple")
    run(found)
    (cell,) = found
    recipe = cell.training.recipe

    def trained(**changes):
        return replace(cell, training=replace(cell.training, recipe=replace(recipe, **changes)))

    faster = trained(optimizer=replace(recipe.optimizer, learning_rate=0.1))
    layout = trained(hardware=replace(recipe.hardware, micro_batch_size=4))
    assert states([faster]) == ["changed"]
    assert states([layout]) == ["finished"]
    assert states(cells("kerple", reads="32,64")) == ["changed"]
    assert record.state(cell, {cell.training.data: "another checksum"}) == "changed"


def test_a_corpus_of_a_measurement_may_lie_elsewhere_and_not_change():
    """Models of the mixed corpus are measured on texts of two others."""

    def chosen(**folders):
        mixed = replace(sweep("kerple"), corpora=("mixed",))
        return list(mixed.cells(Path("runs/smoke"), {"mixed": "data/python-stdlib", **folders}))

    (cell,) = found = chosen(arxiv="a folder/arxiv")
    run(found)
    assert states(found) == states(chosen()) == ["finished"]
    own = load(cell.record.evaluation("last").with_stem("last-arxiv")).targets.data
    for folders, folder in (({"arxiv": "a folder/arxiv"}, "a folder/arxiv"), ({}, "data/arxiv")):
        (moved,) = chosen(**folders)
        assert record.state(moved, {folder: own}) == "finished"
        assert record.state(moved, {folder: "another checksum"}) == "changed"
    Path("data/arxiv").symlink_to(Path("data/python-stdlib").absolute())
    assert states(chosen()) == ["changed"], "the pretended evaluations are of no corpus"
    record.write(cell, replace(record.read(cell), error="out of memory"))
    assert states(chosen()) == ["failed"]


def test_a_result_that_is_lost_is_measured_again():
    found = cells("kerple")
    run(found)
    (found[0].record.evaluation("last")).unlink()
    assert states(found) == ["changed"]


def test_a_model_that_diverges_is_a_result_and_a_machine_that_breaks_is_none():
    found = cells()
    (done,) = cells("alibi")
    run(
        [*found, done],
        fails={
            "/kerple-0": "dape: error: step 7: loss nan, gradient norm nan, at learning rate 1",
            "dape-kerple": "OSError: no space left on device",
        },
    )
    assert states([*found, done]) == ["failed", "missing", "finished"]
    assert choose(plan(found)) == found[1:]
    assert choose(plan([*found, done]), retry=True) == found
    assert choose(plan(found), retry=True) == found
    assert "step 7: loss nan" in record.read(found[0]).error


def test_memory_that_does_not_suffice_is_a_result_of_the_measurement_too():
    found = cells("kerple")
    run(
        found,
        fails={"eval": "dape: error: out of memory at length 512 with 1 window in a forward pass"},
    )
    assert states(found) == ["failed"]
    assert found[0].record.read_record()["validation_loss"] == 2.5


def test_a_measurement_that_failed_runs_again_where_less_is_asked():
    memory = "dape: error: out of memory on cuda"
    found = cells("kerple")
    run(found, fails={"eval": memory})
    shorter = cells("kerple", reads="32,64")
    assert states(found) == ["failed"] and states(shorter) == ["changed"]
    further = replace(
        found[0], commands=(*found[0].commands, USES.command(found[0].run, found[0].regime, "32"))
    )
    assert states([further]) == ["failed"], "the measurement that failed is still asked for"
    run(shorter)
    assert states(shorter) == ["finished"]


def test_a_training_that_failed_fails_whatever_is_measured():
    diverged = "dape: error: step 7: loss nan, gradient norm nan, at learning rate 1"
    run(cells("kerple"), fails={"train": diverged})
    assert states(cells("kerple")) == states(cells("kerple", reads="32,64")) == ["failed"]


def test_only_some_arms_and_seeds_are_due():
    found = cells("kerple", "dape-kerple", "alibi", seeds=(0, 1))
    assert [cell.arm for cell in choose(plan(found), only=["alibi"])] == ["alibi"] * 2
    assert choose(plan(found), only=["alibi"], seeds=[1]) == found[5:]
    assert choose(plan(found), seeds=[1]) == found[1::2]
    assert len(choose(plan(COST.cells()), seeds=[1])) == 60, "of every seed"


def test_a_finished_base_is_trained_again_where_its_model_is_gone():
    everything = RETROFIT.cells({"books": "data/python-stdlib"})
    base, arm = (c for c in everything if c.arm in ("base", "dape-512") and c.training.seed == 0)
    assert sorted(c.arm for c in choose(plan([base, arm]))) == ["base", "dape-512"]
    run([base])
    assert [each.state for each in plan([base, arm])] == ["finished", "missing"]
    assert choose(plan([base, arm])) == [arm]
    record.discard(base)
    assert set(c.arm for c in choose(plan([base, arm]))) == {"base", "dape-512"}
    assert choose(plan([base])) == []
    run([base])
    assert base.run.has_model, "although the run was finished before"


def test_an_arm_does_not_begin_with_the_model_of_an_earlier_recipe():
    everything = RETROFIT.cells({"books": "data/python-stdlib"})
    base, arm = (c for c in everything if c.arm in ("base", "dape-512") and c.training.seed == 0)
    run([base])
    earlier = override(base.training.recipe, {"optimizer.learning_rate": 0.5})
    base.record.recipe.write_text(write(earlier))
    assert states([base, arm]) == ["changed", "missing"] and base.run.has_model
    assert choose(plan([base, arm]), only=["dape-512"]) == [arm, base], (
        "base trains first, as needed"
    )


def test_a_fine_tuning_runs_again_after_its_base_was_trained_by_another_recipe():
    """From the beginning, because the folder of the run holds a model from the earlier base."""

    def chosen(**changes):
        base = replace(RETROFIT.parts[0].base, **changes)
        retrofit = replace(RETROFIT, parts=(replace(RETROFIT.parts[0], base=base),))
        everything = retrofit.cells({"books": "data/python-stdlib"})
        return [c for c in everything if c.arm in ("base", "dape-512") and c.training.seed == 0]

    def tune(cell):
        record.prepare(cell)
        assert not cell.run.path.exists() and states([cell]) == ["missing"]
        for command in cell.commands:
            for path, place in command.keeps.items():
                (cell.run.path / place).parent.mkdir(parents=True, exist_ok=True)
                (cell.run.path / place).write_text("{}")
                (cell.record.path / path).parent.mkdir(parents=True, exist_ok=True)
                (cell.record.path / path).write_text("{}")
        cell.record.recipe.write_text(write(cell.training.recipe))
        record.finish(cell, {str(cell.commands[0]): 1.0}, None)

    base, arm = chosen()
    run([base])
    tune(arm)
    assert states([base, arm]) == ["finished", "finished"]
    (arms,) = (part.base.arms for part in RETROFIT.parts)
    changed = [replace(each, options={**each.options, "optimizer.warmup": 0.5}) for each in arms]
    base, arm = chosen(arms=tuple(changed))
    assert states([base, arm]) == ["changed", "changed"]
    remove(base.run.path)
    run([base])
    assert states([base, arm]) == ["finished", "changed"], "the base alone was trained again"
    record.write(arm, replace(record.read(arm), error="step 7: loss nan"))
    assert states([arm]) == ["changed"]
    tune(arm)
    assert states([base, arm]) == ["finished", "finished"]
    (arm.record.path / "base.yaml").unlink()
    assert states([arm]) == ["finished"], "as in records of earlier versions"


def test_the_price_is_tokens_by_speed_until_one_like_it_is_finished():
    big = [cell for cell in CORE.cells() if cell.regime == Regime("125m", "arxiv", 512)]
    prices = {each.cell.arm: each.minutes for each in plan(big)}
    assert prices["kerple"] == pytest.approx(150e6 / 450e3 / 60 + 1.8)
    assert prices["dape3-kerple"] == pytest.approx(1.5 * 150e6 / 450e3 / 60 + 1.8)
    assert choose(plan(big))[0].arm == "dape3-kerple", "the longest is first"
    turns = {cell.name: int(cell.arm.startswith("dape")) for cell in big}
    last = choose(plan(big), turns=turns)
    assert last == sorted(choose(plan(big)), key=lambda cell: turns[cell.name])
    assert [turns[cell.name] for cell in last] == sorted(turns.values())
    small = cells("kerple", tokens=(2**13, 2**14))
    assert [each.minutes for each in plan(small)] == [None, None]
    run(small[:1])
    first, second = (each.minutes for each in plan(small))
    assert first == pytest.approx(0.1, rel=0.1), "the six seconds of the record"
    assert second == pytest.approx(2 * first)


@pytest.mark.parametrize(
    ("size", "arm"),
    [
        *(("small", arm) for arm in ("kerple", "cope", "transformer-xl", "talking-heads-kerple")),
        *(("125m", "kerple"), ("125m", "dape-alibi"), ("350m", "dape-kerple"), ("350m", "kerple")),
    ],
)
def test_the_estimate_of_an_arm_is_near_the_minutes_in_the_records(size, arm, monkeypatch):
    monkeypatch.chdir(ROOT)
    every = (cell for each in (ALL, CORE, SIZE) for cell in each.cells() if cell.arm == arm)
    found = [cell for cell in every if cell.regime.size == size]
    ended = [cell for cell in found if record.ended(cell)]
    estimates = {_estimate(cell) for cell in ended}
    assert len(estimates) == 1
    spent = [record.minutes([cell]) for cell in ended]
    assert estimates.pop() == pytest.approx(median(spent), rel=0.15)


def test_the_minutes_around_the_updates_do_not_grow_with_the_tokens(monkeypatch):
    """Start, compilation and measurement: half of a short cell would be too early a deadline."""
    monkeypatch.setitem(AROUND, "smoke", 0.08)
    half, whole, double = cells("kerple", tokens=(2**12, 2**13, 2**14))
    run([whole])
    prices = {each.cell.name: each.minutes for each in plan([half, whole, double])}
    spent = prices[whole.name]
    assert prices[half.name] == pytest.approx(0.08 + (spent - 0.08) / 2)
    assert prices[double.name] == pytest.approx(0.08 + (spent - 0.08) * 2)


def test_finished_measurements_correct_the_estimates_of_others():
    found = COST.cells()
    for cell, times in zip(found[:3], (2.0, 3.0, 4.0), strict=True):
        cell.record.path.mkdir(parents=True)
        (cell.record.path / "results.json").write_text("{}")
        words = str(cell.commands[0])
        seconds = {words: 60 * times * cell.minutes}
        record.write(cell, record.End({"results.json": words}, seconds, None, None, 0))
    planned = plan(found[:2] + found[3:])
    times = [each.minutes / each.cell.minutes for each in planned]
    assert times == pytest.approx([2.0, 3.0, *[2.5] * 57])
    assert [each.estimate for each in planned] == [False, False, *[True] * 57]
    assert plan(found)[-1].minutes == pytest.approx(3 * found[-1].minutes)
    tuned = SMOLLM2.cells()
    assert [each.minutes for each in plan([*tuned, *found])[: len(tuned)]] == [
        cell.minutes for cell in tuned
    ], "a training is no measurement"
    one = [replace(each, estimate=False) for each in plan(found[4:5])]
    assert "~: includes estimates" not in table(one, devices=1).note
    assert "~: includes estimates" in table([*one, *plan(found[:4])], devices=1).note


def test_the_plan_marks_prices_that_no_finished_cell_gives():
    legend = "~: includes estimates"
    estimated = table(plan(COST.cells()), devices=1)
    assert [row[-1] for row in estimated.rows] == [
        *["~6"] * 3,
        *["~8"] * 3,
        *["~10"] * 3,
        *["~12"] * 3,
        "~108",
    ]
    assert legend in estimated.note
    core = table(plan(CORE.cells()), devices=1)
    assert all(row[-1].startswith("~") for row in core.rows) and legend in core.note
    small = cells("kerple", tokens=(2**13, 2**20))
    assert legend not in table(plan(small), devices=1).note, "no price at all"
    assert "hours" not in table(plan(small), devices=1).note
    run(small[:1])
    due = table(plan(small), devices=1)
    assert [row[-1] for row in due.rows] == ["0", "13", "13"] and legend not in due.note


def test_the_hours_are_of_the_devices_together_and_of_the_longest_cell_at_least():
    """Three cells of 20, 40 and 240 minutes: five hours on a GPU, four on any number."""
    due = [
        Planned(cell, "missing", minutes, estimate=False)
        for cell, minutes in zip(cells("kerple", "alibi", "fire"), (20.0, 40.0, 240.0), strict=True)
    ]
    (done,) = cells("rope")
    due.append(Planned(done, "finished", 600.0, estimate=True))
    hours = {1: "5.0 hours on 1 GPU", 2: "4.0 hours on 2 GPUs", 8: "4.0 hours on 8 GPUs"}
    for devices, expected in hours.items():
        assert table(due, devices).note.endswith(f"runs again. About {expected}.")
    unknown = replace(due[0], minutes=None)
    note = table([unknown, *due[1:]], 1).note
    assert "About 4.7 hours" in note
    assert note.endswith("—: no price was measured (docs/chomsky.md for encoders).")


@pytest.mark.parametrize(("more", "enough"), [(-1, 3), (0, 2), (1, 2)])
def test_a_test_document_is_long_enough_if_a_token_follows_the_longest_window(more, enough):
    """A window of all tokens of the shortest document has nothing to predict at its end."""
    sizes = sorted(len(file.read_bytes()) for file in Path("made/text/test").iterdir())
    (cell,) = cells("kerple", reads=f"32,{sizes[0] + more}")
    assert [count for count, _ in long_documents([cell]).values()] == [enough]


def test_cells_whose_corpus_is_not_here_wait():
    waiting = without_corpus(CORE.cells({"arxiv": "nowhere"}))
    assert {folder: len(cells) for folder, cells in waiting.items()} == {
        "nowhere": 9,
        "data/books": 9,
    }
    assert without_corpus(cells("kerple")) == {}


def test_cells_wait_for_every_corpus_that_they_are_measured_on():
    """A training of minutes would end without a measurement."""
    here = "data/python-stdlib"
    every = AMOUNTS.cells({"mixed": here, "arxiv": here})
    assert without_corpus(every) == {"data/books": every}
    assert {key: value[1] for key, value in long_documents(every).items()} == {
        (here, 16_384): every
    }
    assert without_corpus(AMOUNTS.cells(dict.fromkeys(("mixed", "arxiv", "books"), here))) == {}


def test_the_plan_as_a_table_adds_up():
    found = cells("kerple", "alibi", tokens=(2**13, 2**14))
    run(found[:2])
    shown = table(plan(found), devices=1)
    assert shown.header == [
        "regime",
        *("finished", "failed", "missing", "changed"),
        "GPU minutes due",
    ]
    assert [row[1:5] for row in shown.rows] == [
        ["2", "0", "0", "0"],
        ["0", "0", "2", "0"],
        ["2", "0", "2", "0"],
    ]


def test_the_plan_prices_the_cells_that_will_run():
    """Failed cells that are retried, and a base whose model is gone, beside the missing ones."""
    (failed, *finished), retry = cells("kerple", "alibi"), {"retry": True}
    run([failed], fails={"train": "dape: error: step 7: loss nan, gradient norm nan"})
    run(finished)
    planned = [
        replace(each, minutes=minutes)
        for each, minutes in zip(plan([failed, *finished]), (30.0, 90.0), strict=True)
    ]
    for chosen, minutes in ((choose(planned), "0"), (choose(planned, **retry), "30")):
        assert table(planned, 1, chosen).rows[-1][-1] == minutes
    shown = table(planned, 1, [failed, *finished])
    assert shown.rows[-1][-1] == "120" and "About 2.0 hours" in shown.note


def finished(order, prices, devices, minutes):
    """The names of cells that end in time, where each device takes the first that can."""
    free, left, ended = [0.0] * devices, list(order), []
    while left:
        device = min(range(devices), key=free.__getitem__)
        can = [cell for cell in left if free[device] + prices[cell.name] <= minutes]
        if not can:
            return ended
        left.remove(can[0])
        free[device] += prices[can[0].name]
        ended.append(can[0].name)
    return ended


def test_a_long_cell_of_a_later_turn_starts_while_there_is_time_for_it():
    """Ten cells of 3.9 minutes, then four of 21.3, in 25.2 minutes on three devices."""
    found = cells(*(f"arm-{n}" for n in range(14)))
    prices = {cell.name: 3.9 if n < 10 else 21.3 for n, cell in enumerate(found)}
    first = {cell.name for cell in found[:10]}
    assert set(finished(found, prices, 3, 25.2)) == first
    packed = finished(pack(found, prices, 3, 25.2), prices, 3, 25.2)
    assert set(packed) == first | {found[10].name}


def test_cells_that_overlap_take_less_time_together():
    """Three cells of 4 minutes on a device, half a minute of each beside the next, take 11."""
    found = cells("kerple", "alibi", "fire", "rope")
    prices = {cell.name: 4.0 for cell in found[:3]} | {found[3].name: 11.1}
    assert pack([found[3], *found[:3]], prices, 1, 11.0, 0.5) == [*found[:3], found[3]]
    assert pack([found[3], *found[:3]], prices, 1, 11.1, 0.5) == [found[3], *found[:3]]
    assert pack(found, prices, 2, 11.1, 0.5) == [found[3], *found[:3]]
    assert pack(found, prices, 2, 11.1) == found


def test_packed_cells_lose_none_of_the_first_turn_and_leave_less_time_over():
    random, spent = Random(0), [0.0, 0.0]
    every = cells(*(f"arm-{n}" for n in range(20)))
    for _ in range(100):
        found = every[: random.randint(1, 20)]
        prices = {cell.name: random.choice([3.5, 4.0, 7.1, 13.8, 21.3]) for cell in found}
        turns = {cell.name: random.randint(0, 2) for cell in found}
        devices, minutes = random.randint(1, 4), random.uniform(3.0, 40.0)
        found.sort(key=lambda cell: (turns[cell.name], -prices[cell.name]))
        packed = pack(found, prices, devices, minutes)
        assert sorted(each.name for each in packed) == sorted(each.name for each in found)
        before, after = (finished(order, prices, devices, minutes) for order in (found, packed))
        assert {name for name in before if turns[name] == 0} <= set(after)
        for n, names in enumerate((before, after)):
            spent[n] += sum(prices[name] for name in names)
    assert spent[1] > spent[0]
