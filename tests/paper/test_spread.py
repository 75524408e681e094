import errno
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from laboratory import Pretended, cells, enter, sweep

import folders
from dape.data.shards import Corpus
from dape.evaluate.record import load
from dape.files import remove
from dape.paper import record
from dape.paper.beyond import RETROFIT
from dape.paper.cells import Command
from dape.paper.experiments import COST
from dape.paper.plan import choose, plan
from dape.paper.spread import Outcome, Workers, describe, devices, spread
from dape.paper.sweep import MEASURED_ON
from dape.runs import RunFolder
from dape.train.loop import divergence
from dape.train.recipe import Recipe, read
from dape.train.task import LanguageModelling

STUB = """
import os, sys, time
name = sys.argv[sys.argv.index("--name") + 1].replace("/", "_") if "train" in sys.argv else "eval"
with open("log", "a") as log:
    log.write(f"{name} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def laboratory(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)


def silent(line):
    pass


def test_no_two_cells_share_a_device_at_a_time():
    busy, most, lock, full = set(), [], threading.Lock(), threading.Event()

    class Watched(Pretended):
        def call(self, words, device, log):
            with lock:
                if words[0] == "train":
                    assert device not in busy
                    busy.add(device)
                    most.append(len(busy))
                    if len(busy) == 3:
                        full.set()
            full.wait(10)  # the first trainings last until every device has one
            time.sleep(0.02)
            status = super().call(words, device, log)
            with lock:
                if words[0] == "eval":
                    busy.discard(device)
            return status

    found = cells("kerple", "alibi", "fire", "t5", "rope", "nope")
    workers = Watched()
    outcomes = spread(found, ["0", "1", "2"], workers, silent)
    assert {each.cell.name for each in outcomes} == {cell.name for cell in found}
    assert max(most) == 3
    assert {device for _, device in workers.calls} == {"0", "1", "2"}
    devices_of = {}
    for words, device in workers.calls:
        run = words[words.index("--name") + 1] if words[0] == "train" else words[1]
        devices_of.setdefault(run.removeprefix("runs/"), set()).add(device)
    assert all(len(each) == 1 for each in devices_of.values()), "a cell stays on its device"


def test_a_cell_waits_for_the_model_it_begins_with():
    words, lines = [], []

    class Ordered(Pretended):
        def call(self, given, device, log):
            words.append(given)
            if given[0] == "retrofit":
                run = found[given[1]]
                assert record.read(run).error is None
                return 1
            return super().call(given, device, log)

    cells = RETROFIT.cells({"books": "data/python-stdlib"})
    chosen = [cell for cell in cells if cell.arm in ("base", "dape-512")]
    found = {str(cell.run): cell for cell in chosen}
    spread(
        sorted(chosen, key=lambda cell: cell.arm, reverse=True), ["0", "1"], Ordered(), lines.append
    )
    assert [each[0] for each in words].count("retrofit") == 3
    assert all(cell.run.has_model or cell.needs for cell in chosen)


def test_no_cell_starts_with_the_model_of_a_cell_that_failed():
    """Such as an older model in the same folder."""
    everything, lines = RETROFIT.cells({"books": "data/python-stdlib"}), []
    (base,) = (c for c in everything if c.arm == "base" and c.training.seed == 0)
    arms = [cell for cell in everything if cell.needs == base.name]
    other, workers = cells("kerple"), Pretended(fails={"train": "OSError: no space left"})
    ends = spread([*arms, base, *other], ["0"], workers, lines.append)
    assert [end.cell for end in ends] == [base, *other]
    assert [words[0] for words, _ in workers.calls] == ["train", "train"]
    told = [line for line in lines if "does not start" in line]
    assert told == [f"{arm.name} does not start without the model of {base.name}" for arm in arms]


def test_the_end_of_a_cell_is_said_in_minutes():
    (cell,) = cells("kerple")
    said = describe(Outcome(cell, "3", 90.0, None))
    assert said == f"{cell.name} is finished (1.5 min on 3)"


def test_a_training_on_another_corpus_begins_without_the_measurements_of_the_first():
    (cell,) = cells("kerple")
    spread([cell], ["cpu"], Pretended(), silent)
    kept = cell.record.evaluation("last")
    assert kept.is_file()
    diverged = "dape: error: step 7: loss nan, gradient norm nan, at learning rate 1"
    spread([cell], ["cpu"], Pretended(fails={"eval": diverged}), silent)
    assert kept.is_file(), "of the same model"
    remove(Path("data"))
    folders.prepare(Path("other"), sizes=[500, 700, 650])
    Path("other").rename("data")
    Path("data/data").rename("data/python-stdlib")
    remove(cell.run.path)
    assert [each.state for each in plan([cell])] == ["changed"]
    spread([cell], ["cpu"], Pretended(fails={"train": diverged}), silent)
    assert [each.state for each in plan([cell])] == ["failed"] and not kept.exists()


def test_a_cell_that_fails_is_said_in_one_line_and_the_others_go_on():
    lines = []
    found = cells("kerple", "alibi")
    workers = Pretended(fails={"/kerple-0": "ValueError: no such thing"})
    spread(found, ["cpu"], workers, lines.append)
    assert [line for line in lines if "failed" in line] == [
        f"{found[0].name} failed: ValueError: no such thing (status 2) (0.0 min on cpu)"
    ]
    assert record.read(found[1]).error is None
    assert "much" in record.log(found[0]).read_text()


def test_a_record_that_cannot_be_written_fails_its_cell_alone():
    found = cells("kerple", "alibi")
    found[0].record.path.parent.mkdir(parents=True)
    found[0].record.path.write_text("a file where the folder was to be")
    outcomes = {each.cell.arm: each.error for each in spread(found, ["cpu"], Pretended(), silent)}
    assert "File exists" in outcomes["kerple"] and outcomes["alibi"] is None


def test_a_gpu_that_is_lost_gets_no_further_cell(monkeypatch):
    """PyTorch sees no GPU there, and a command would train on the CPU in its place."""
    gpus, lines = [2], []
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus[0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    class Losing(Pretended):
        sees = Workers.sees

        def call(self, words, device, log):
            gpus[0] = 1 if device == "1" else gpus[0]
            return super().call(words, device, log)

    workers, found = Losing(), cells("kerple", "alibi", "fire", "rope")
    ends = spread(found, ["0", "1"], workers, lines.append)
    assert [each.cell.name for each in ends if each.device == "1"] == [found[1].name]
    assert len(ends) == 4 and lines.count("GPU 1 is gone; no further cell starts there") == 1
    gpus[0] = 0
    assert spread(cells("nope"), ["0"], Losing(), lines.append) == []
    assert Workers().sees("cpu")


def test_after_the_minutes_nothing_starts():
    found = cells("kerple", "alibi")
    assert spread(found, ["cpu"], Pretended(), silent, minutes=0.0) == []
    assert choose(plan(found)) == found


def test_a_cell_that_would_end_too_late_does_not_start():
    found = cells("kerple", "alibi", "fire")
    prices = {"kerple": 11.0, "alibi": 9.0, "fire": 10.5}
    ends = spread(
        found,
        ["cpu"],
        Pretended(),
        silent,
        minutes=10.0,
        prices={cell.name: prices[cell.arm] for cell in found},
    )
    assert [end.cell.arm for end in ends] == ["alibi"]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_training_may_start_beside_measurements_alone(overlap):
    busy, most, lock = {"train": 0, "eval": 0}, {"train": 0, "both": 0}, threading.Lock()
    beside = threading.Event()

    class Watched(Pretended):
        def call(self, words, device, log):
            kind = words[0]
            with lock:
                busy[kind] += 1
                most["train"] = max(most["train"], busy["train"])
                most["both"] = max(most["both"], busy["train"] + busy["eval"])
                if busy["train"] and busy["eval"]:
                    beside.set()
            if overlap and kind == "eval":
                beside.wait(10)  # the first measurements last until a training is beside them
            time.sleep(0.01)
            status = super().call(words, device, log)
            with lock:
                busy[kind] -= 1
            return status

    found = cells("kerple", "alibi", "fire", "t5")
    ends = spread(found, ["0"], Watched(), silent, overlap=overlap)
    assert {end.cell.name for end in ends} == {cell.name for cell in found}
    assert not any(end.error for end in ends)
    assert most == {"train": 1, "both": 2 if overlap else 1}


def test_a_cost_is_measured_on_a_gpu_without_another_cell():
    """Also where a training leaves room, whose own measurements run beside the next training."""
    busy, beside, lock = [], [], threading.Lock()

    class Watched(Pretended):
        def call(self, words, device, log):
            with lock:
                busy.append(words[0])
                if "bench" in busy:
                    beside.append(list(busy))
            time.sleep(0.05)
            status = 0 if words[0] == "bench" else super().call(words, device, log)
            with lock:
                busy.remove(words[0])
            return status

    costs = [
        replace(cell, commands=(Command(cell.commands[0].words, {}),)) for cell in COST.cells({})
    ]
    kerple, alibi = cells("kerple", "alibi")
    found = [kerple, costs[0], alibi, costs[1]]
    ends = spread(found, ["0"], Watched(), silent, overlap=True)
    assert {end.cell.name for end in ends} == {cell.name for cell in found}
    assert beside == [["bench"], ["bench"]]


@pytest.mark.parametrize(
    ("left", "age", "together"), [(29.0, 0.0, 2), (31.0, 0.0, 1), (29.0, 60.0, 1)]
)
def test_a_training_starts_half_a_minute_before_the_end_of_another(
    left, age, together, monkeypatch
):
    """By the last two updates of this process: older metrics are of an interrupted training."""
    monkeypatch.setattr("dape.paper.spread.LOOK", 0.01)
    lock, second, busy, most = threading.Lock(), threading.Event(), [], []

    class Watched(Pretended):
        def call(self, words, device, log):
            if words[0] != "train":
                return super().call(words, device, log)
            with lock:
                busy.append(words)
                most.append(len(busy))
                if len(most) == 2:
                    second.set()
            status = super().call(words, device, log)
            run = RunFolder(Path("runs") / words[words.index("--name") + 1])
            steps = read(run.recipe, Recipe).training.steps
            lines = (
                {"step": 1, "seconds": 1.0},
                {"step": steps - 6, "seconds": 90.0},  # then two of the last six steps
                {"step": steps - 4, "seconds": 90 + left / 2},
            )
            ended = run.metrics.read_text()
            run.metrics.write_text("".join(f"{json.dumps(each)}\n" for each in lines))
            os.utime(run.metrics, (time.time() - age,) * 2)
            second.wait(5.0 if together == 2 else 0.3)
            run.metrics.write_text(ended)
            with lock:
                busy.remove(words)
            return status

    ends = spread(cells("kerple", "alibi"), ["0"], Watched(), silent, overlap=True)
    assert [end.error for end in ends] == [None, None]
    assert max(most) == together


def test_the_weights_go_and_the_small_results_stay():
    found = cells("kerple")
    spread(found, ["cpu"], Pretended(), silent, weights=False)
    (cell,) = found
    assert not cell.run.model.exists() and not cell.run.checkpoints.exists()
    assert cell.record.evaluation("last").is_file()
    assert [each.state for each in plan(found)] == ["finished"]


def test_an_interruption_ends_the_processes_and_the_next_time_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 6)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = cells("kerple", "alibi", "fire")
    workers = Workers(program=(sys.executable, "-c", STUB))
    log = tmp_path / "log"

    def interrupt():
        while not (log.is_file() and len(log.read_text().splitlines()) == 2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    begun = time.monotonic()
    # A process that a shell started in the background ignores the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        spread(found, ["3", "5"], workers, silent)
    signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - begun < 30, "the processes were to sleep for a minute"
    assert not workers.running
    started = sorted(log.read_text().split())
    assert started[:2] == ["3", "5"], "each sees its own device alone"
    assert choose(plan(found)) == found
    assert len(spread(found, ["cpu"], Pretended(), silent)) == 3
    assert choose(plan(found)) == []


def test_after_an_interruption_no_further_command_starts(tmp_path):
    """Such as the measurement of a training that ended a moment before."""
    workers = Workers(program=(sys.executable, "-c", "print('started')"))
    with (tmp_path / "output").open("wb") as log:
        assert workers.call([], "cpu", log) == 0
        workers.stop()
        assert workers.call([], "cpu", log) != 0
    assert (tmp_path / "output").read_text() == "started\n"


@pytest.mark.parametrize(
    ("record_of_run", "folder", "goes_on"),
    [
        ("{}", "checkpoints", True),
        ('{"ended": null}', "checkpoints", True),
        ('{"ended": "now"}', "model", True),
        ('{"ended": "now"}', "adapters", True),
        ('{"ended": "now"}', "checkpoints", False),
    ],
)
def test_a_run_goes_on_unless_its_model_was_discarded(record_of_run, folder, goes_on):
    (cell,) = cells("kerple")
    (cell.run.path / folder).mkdir(parents=True)
    (cell.run.path / folder / "config.json").write_text("{}")
    cell.run.record.write_text(record_of_run)
    record.prepare(cell)
    assert cell.run.path.exists() == goes_on


def test_two_spreads_at_a_time_never_run_the_same_cell():
    """The second takes the next cells, and leaves what the first one ends."""
    found = cells("kerple", "alibi", "fire")
    held, go = threading.Event(), threading.Event()

    class Slow(Pretended):
        def call(self, words, device, log):
            held.set()
            assert go.wait(10)
            return super().call(words, device, log)

    class Watched(Pretended):
        def call(self, words, device, log):
            if "alibi" in " ".join(words) and words[0] == "eval":
                go.set()
                first.join()
            return super().call(words, device, log)

    first = threading.Thread(target=spread, args=(found[:1], ["0"], Slow(), silent))
    first.start()
    assert held.wait(10)
    workers = Watched()
    assert [each.cell for each in spread(found, ["1"], workers, silent)] == found[1:]
    assert not [words for words, _ in workers.calls if "kerple" in " ".join(words)]
    assert [each.state for each in plan(found)] == ["finished"] * 3
    assert not list(Path("runs/smoke/.claims").rglob(".lock"))


def test_a_cell_that_another_process_holds_to_the_end_is_left():
    found = cells("kerple", "alibi")
    with record.claimed(found[0]):
        assert [each.cell for each in spread(found, ["cpu"], Pretended(), silent)] == found[1:]
    assert choose(plan(found)) == found[:1]


def test_a_record_is_whole_while_its_files_are_copied_again(monkeypatch):
    """A second process reads the records of ended cells meanwhile."""
    (cell,) = found = cells("kerple")
    spread(found, ["cpu"], Pretended(), silent)
    before = cell.record.recipe.read_text()

    def fail(source, target):
        Path(target).write_text(before[:9])
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("shutil.copyfile", fail)
    (end,) = spread(found, ["cpu"], Pretended(), silent)
    assert "Input/output error" in end.error and cell.record.recipe.read_text() == before


def test_what_another_recipe_left_does_not_mix_with_a_new_record():
    found = cells("kerple")
    spread(found, ["cpu"], Pretended(), silent)
    left = found[0].record.path / "evaluation" / "sliding-64.json"
    left.write_text("of another model")
    again = cells("kerple", tokens=(2**14,))[0]
    moved = again.record.path
    moved.parent.mkdir(parents=True)
    found[0].record.path.rename(moved)
    spread([again], ["cpu"], Pretended(), silent)
    assert not (moved / "evaluation" / "sliding-64.json").exists()
    assert [each.state for each in plan([again])] == ["finished"]


def test_measurements_on_one_corpus_never_stand_for_those_on_another():
    """The second evaluation of a run ends by a kill, and its file is still that of the first."""
    data = {"mixed": "data/python-stdlib", "arxiv": "data/arxiv", "books": "data/books"}
    made = replace(sweep("kerple"), corpora=("mixed",)).cells(Path("runs/smoke"), data)
    (cell,) = found = list(made)
    spread(found, ["cpu"], Pretended(), silent)
    arxiv, books = (
        cell.record.path / f"evaluation/last-{name}.json" for name in MEASURED_ON["mixed"]
    )
    arxiv.unlink()
    books.write_text("of books")
    spread(found, ["cpu"], Pretended(fails={"data/books": "Killed"}), silent)
    assert arxiv.is_file() and books.read_text() == "of books"


class Dated(Pretended):
    """Workers whose trainings have a start; `killed` ones leave what they have so far."""

    def call(self, words, device, log):
        status = super().call(words, device, log)
        if words[0] == "train":
            run = RunFolder(Path("runs") / words[words.index("--name") + 1])
            run.path.mkdir(parents=True, exist_ok=True)
            dated = run.read_record() | {"started": "yesterday" if not self.losses else "today"}
            run.record.write_text(json.dumps(dated))
        return status


def test_measurements_of_an_earlier_training_do_not_stand_beside_a_new_one():
    """A base model that is gone is trained again; until measured again, the cell is missing."""
    (cell,) = found = cells("kerple")
    spread(found, ["cpu"], Dated(), silent)
    left = cell.record.path / "learned" / "64.json"
    left.parent.mkdir()
    left.write_text("of the first training")
    remove(cell.run.path)
    today = {"losses": {"kerple": [1.0] * 5}}
    spread(found, ["cpu"], Dated(fails={"train": "Killed"}, **today), silent)
    assert [each.state for each in plan(found)] == ["finished"] and left.is_file()
    assert cell.record.read_record()["started"] == "yesterday", "a killed training takes nothing"
    remove(cell.run.path)
    spread(found, ["cpu"], Dated(fails={"eval": "Killed"}, **today), silent)
    assert [each.state for each in plan(found)] == ["missing"]
    assert not cell.record.evaluation("last").exists() and not left.exists()
    assert b"Killed" in record.log(cell).read_bytes()
    spread(found, ["cpu"], Dated(**today), silent)
    assert [each.state for each in plan(found)] == ["finished"]
    assert load(cell.record.evaluation("last")).measurements[0].loss == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        ("4,6", 2, ["4", "6"]),
        (None, 2, ["0", "1"]),
        (None, 1, ["0"]),
        ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-b"]),
        ("", 0, ["cpu"]),
    ],
)
def test_devices_are_named_as_the_environment_names_them(monkeypatch, visible, count, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices() == expected


def test_records_are_where_the_plan_looks():
    (cell,) = cells("kerple")
    assert cell.record.path == Path("runs/smoke/cells/smoke-python-stdlib-32-8.19k/kerple-0")


def test_the_error_of_a_cell_is_of_its_last_attempt(monkeypatch):
    """Lack of memory is a result, and a process that was killed without a word is none."""
    found = cells("kerple")
    dies = "import os; print('much', flush=True); os.kill(os.getpid(), 9)"
    warns = "print('dape: error: out of memory on cuda'); print('a warning at the exit'); exit(2)"
    for code, state, error in (
        (dies, "missing", "much (ended by SIGKILL)"),
        (warns, "failed", "out of memory on cuda (status 2)"),
        (dies, "failed", "much (ended by SIGKILL)"),
    ):
        workers = Workers(program=(sys.executable, "-c", code))
        (end,) = spread(found, ["cpu"], workers, silent)
        assert end.error == error
        assert [each.state for each in plan(found)] == [state]
    assert record.read(found[0]).error == "out of memory on cuda (status 2)"


@pytest.mark.parametrize("loss", [3.5, 1e22, math.inf, -math.inf, math.nan])
def test_every_loss_at_which_a_training_diverges_is_a_result(loss):
    metrics = {"step": 7, "loss": loss, "grad_norm": math.inf, "learning_rate": 0.1}
    (cell,) = found = cells("kerple")
    told = divergence(
        LanguageModelling(cell.training.recipe, Corpus(cell.training.data)), metrics, 3.0
    )
    spread(found, ["0"], Pretended(fails={"train": f"dape: error: {told}"}), silent)
    assert [each.state for each in plan(found)] == ["failed"]


def test_beside_another_cell_a_lack_of_memory_is_no_result():
    found = cells("kerple", "alibi")
    fails = {
        "/kerple-0": "dape: error: out of memory on cuda",
        "/alibi-0": "dape: error: step 7: loss nan, gradient norm nan, at learning rate 1",
    }
    spread(found, ["0"], Pretended(fails=fails), silent, overlap=True)
    assert [each.state for each in plan(found)] == ["missing", "failed"]
    spread(found[:1], ["0"], Pretended(fails=fails), silent)
    assert [each.state for each in plan(found)] == ["failed", "failed"]
