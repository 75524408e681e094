"""Running a benchmark: what it leaves, how it goes on, and that it learns."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from cells import SMALL, small

from dape.chomsky import benchmark as benchmarks
from dape.chomsky import run as runs
from dape.chomsky.cell import load, load_model, path
from dape.chomsky.encoder import Model
from dape.chomsky.measure import Evaluation, OneByOne, accuracies
from dape.chomsky.run import Job, plan
from dape.chomsky.stack import Stack, Training
from dape.chomsky.tasks import TASKS
from dape.errors import UserError
from dape.files import locked

CPU = torch.device("cpu")


def silent(*_):
    pass


def run_cpu(benchmark, together=1):
    runs.run(benchmark, CPU, silent, ["chomsky", "train"], together)


def numbers(folder):
    """What is in the cells of a folder, without times."""
    found = {}
    for file in sorted(folder.glob("cells/*/*.json")):
        content = json.loads(file.read_text())
        del content["seconds"], content["provenance"], content["models"]
        found[str(file.relative_to(folder))] = content
    return found


def test_a_cell_says_how_it_was_made(tmp_path):
    benchmark = small(tmp_path, tasks=("even-pairs",), schemes=("kerple",))
    run_cpu(benchmark)
    cell = load(path(tmp_path, "even-pairs", "kerple", 1))
    assert cell.settings == benchmark.settings() and cell.models == 2
    assert [step for step, _ in cell.loss] == [1, 2, 3, 4, 5, 6]
    assert len(cell.accuracy) == 9 and all(0 <= each <= 100 for each in cell.accuracy)
    assert cell.provenance["command"] == "dape chomsky train"
    assert cell.seconds["training"] > 0 and cell.seconds["evaluation"] > 0
    model = load_model(tmp_path, "even-pairs", "kerple", 1)
    assert sum(p.numel() for p in model.parameters()) == cell.parameters
    (found,) = accuracies(OneByOne([model]), TASKS["even-pairs"], benchmark.evaluation, CPU)
    assert cell.accuracy == pytest.approx(found, abs=5e-4)
    assert json.loads((tmp_path / "run.json").read_text())["command"] == "dape chomsky train"
    assert not list(tmp_path.glob("checkpoints/*"))


def test_finished_cells_are_not_made_again(tmp_path):
    benchmark = small(tmp_path)
    run_cpu(benchmark)
    whole = numbers(tmp_path)
    assert len(whole) == 8 and plan(benchmark) == []
    missing = path(tmp_path, "binary-addition", "randomized-rope", 1)
    missing.unlink()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("cells/*/*.json")}
    assert plan(benchmark) == [Job("binary-addition", "randomized-rope", (1,))]
    run_cpu(benchmark)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    alone, beside = (
        each["cells/binary-addition/randomized-rope-1.json"] for each in (numbers(tmp_path), whole)
    )
    assert alone["accuracy"] == beside["accuracy"]
    assert alone["loss"] == [[step, pytest.approx(loss, abs=1e-4)] for step, loss in beside["loss"]]


TWO = {"tasks": ("binary-addition",), "seeds": (0, 1)}  # a static and a randomised scheme


def test_jobs_train_side_by_side_as_they_do_alone(tmp_path):
    alone, beside = small(tmp_path / "alone"), small(tmp_path / "beside")
    run_cpu(alone)
    run_cpu(beside, together=3)
    assert numbers(alone.folder) == numbers(beside.folder)
    models = {load(file).models for file in beside.folder.glob("cells/*/*.json")}
    assert models == {6, 2}, "three jobs of two seeds, then the last"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_run_goes_on_exactly(tmp_path, monkeypatch, number):
    """In the middle of the curve's points, of jobs side by side."""
    monkeypatch.setattr(runs, "POINTS", 3)
    whole, cut = small(tmp_path / "whole", **TWO), small(tmp_path / "cut", **TWO)
    run_cpu(whole, together=2)
    counted, step = [], Stack.step

    def signalled(stack, length):
        counted.append(length)
        if len(counted) == 5:  # the third step of the first job
            os.kill(os.getpid(), number)
        step(stack, length)

    monkeypatch.setattr(Stack, "step", signalled)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run_cpu(cut, together=2)
    assert len(counted) == 6 and signal.getsignal(number) == before
    run_cpu(cut, together=2)
    assert len(counted) == 12
    assert numbers(cut.folder) == numbers(whole.folder)


def test_a_killed_training_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "POINTS", 6)
    monkeypatch.setattr(runs, "CHECKPOINTS", 3)
    whole, cut = small(tmp_path / "whole", **TWO), small(tmp_path / "cut", **TWO)
    run_cpu(whole)
    counted, step = [], Stack.step

    def killed(stack, length):
        counted.append(length)
        if len(counted) == 6:
            raise MemoryError
        step(stack, length)

    monkeypatch.setattr(Stack, "step", killed)
    with pytest.raises(MemoryError):
        run_cpu(cut)
    copy = small(tmp_path / "copy", **TWO)
    shutil.copytree(cut.folder / "checkpoints", copy.folder / "checkpoints")
    for killed_or_copied in (cut, copy):
        counted[:] = [None] * 6
        run_cpu(killed_or_copied)  # from the checkpoint at 4
        assert len(counted) == 6 + 2 + 6
        assert numbers(killed_or_copied.folder) == numbers(whole.folder)


def test_a_checkpoint_of_other_settings_is_left_alone(tmp_path, monkeypatch):
    """Tests are interrupted, so that each training leaves the checkpoint at its end."""
    benchmark = small(tmp_path, tasks=("even-pairs",), schemes=("kerple",))
    monkeypatch.setattr(runs, "accuracies", interrupt)
    other = replace(benchmark, training=replace(benchmark.training, learning_rate=0.5))
    steps, step = [], Stack.step
    monkeypatch.setattr(Stack, "step", lambda stack, n: (steps.append(n), step(stack, n)))
    for given, made in ((benchmark, 6), (benchmark, 6), (other, 12), (benchmark, 18)):
        with pytest.raises(KeyboardInterrupt):
            run_cpu(given)
        assert len(steps) == made


def interrupt(*_):
    raise KeyboardInterrupt


def test_cells_of_other_settings_are_refused(tmp_path):
    benchmark = small(tmp_path, tasks=("even-pairs",), schemes=("kerple",))
    run_cpu(benchmark)
    other = replace(benchmark, training=replace(benchmark.training, steps=7))
    with pytest.raises(UserError, match=r"training\.steps=7 \(was 6\); take another --out"):
        plan(other)


def test_long_jobs_come_first():
    jobs = plan(replace(SMALL, out="nowhere", tasks=("even-pairs", "duplicate-string")))
    assert [job.task for job in jobs[:2]] == ["duplicate-string"] * 2


def test_even_pairs_are_learned(tmp_path):
    """And answered at lengths never seen: five lengths beyond four are no chance."""
    benchmark = small(
        tmp_path,
        tasks=("even-pairs",),
        schemes=("rope",),
        model=Model(hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
        training=Training(steps=300, batch_size=64, length=4, learning_rate=5e-3, dropout=0.0),
        evaluation=Evaluation(longest=5, samples=200),
    )
    run_cpu(benchmark)
    for seed in (0, 1):
        cell = load(path(tmp_path, "even-pairs", "rope", seed))
        assert cell.loss[-1][1] < 0.02 and cell.score_within == 100


def test_a_recipe_reads_what_it_writes(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(benchmarks.write(SMALL))
    assert benchmarks.read(file) == SMALL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [even-pair]", "unknown task 'even-pair'; did you mean 'even-pairs'"),
        ("schemes: [kerpel]", "unknown scheme 'kerpel'"),
        ("schemes: [learned]", "a learned embedding ends at the training length"),
        ("seeds: [0, 0]", "seeds=0,0: give a value, each once"),
        ("seeds: [-1]", "seeds=-1 must be at least 0"),
        ("seeds: [1073741824]", "seeds=1073741824 must be below 1,073,741,824"),
        ("tasks: even-pairs", "tasks='even-pairs': expected a list"),
        ("tasks: []", "tasks=: give a value, each once"),
        ("model: {hidden_size: 60}", "hidden_size=60 is not a multiple"),
        ("training: {steps: 0}", "training.steps=0 must be at least 1"),
        ("training: {learning_rate: 0}", "training.learning_rate=0.0 must be above 0"),
        ("training: {dropout: 1}", "training.dropout=1.0 must be from 0 to below 1"),
        ("training: {precision: fp16}", "expected 'fp32' or 'tf32'"),
        ("evaluation: {longest: 40}", "evaluation.longest=40 must be above training.length=40"),
        ("training: {rate: 1}", "training.rate"),
        ("model: {pool: 1499}", "model.pool=1499 is less than the 1500 tokens of the longest"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        benchmarks.read(file)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02N."])
def test_a_checkpoint_that_cannot_be_read_is_none(tmp_path, monkeypatch, content):
    benchmark = small(tmp_path, tasks=("even-pairs",), schemes=("kerple",))
    (job,) = plan(benchmark)
    file = runs._checkpoint(job, benchmark)
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    (tmp_path / "run.json").write_text("{}")
    steps = []
    monkeypatch.setattr(Stack, "step", lambda stack, length: steps.append(length))
    monkeypatch.setattr(runs, "accuracies", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_cpu(benchmark)
    assert len(steps) == 6


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no benchmark; give another --out"):
        run_cpu(small(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    run = tmp_path / "run"  # of a language model, whose record has the same name
    run.mkdir()
    for name in ("config.yaml", "run.json"):
        (run / name).write_text("{}")
    with pytest.raises(UserError, match="exists and is no benchmark; give another --out"):
        run_cpu(small(run))
    assert (run / "run.json").read_text() == "{}" and len(list(run.iterdir())) == 2


def test_a_second_process_does_not_train_in_the_same_folder(tmp_path):
    with locked(tmp_path, "busy"), pytest.raises(UserError, match="another process trains in"):
        run_cpu(small(tmp_path))


def test_a_checkpoint_that_a_kill_left_behind_the_last_cell_is_removed(tmp_path, monkeypatch):
    benchmark = small(tmp_path, tasks=("even-pairs",), schemes=("kerple",))
    monkeypatch.setattr(runs, "remove", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_cpu(benchmark)
    monkeypatch.undo()
    (file,) = (tmp_path / "checkpoints").iterdir()
    assert plan(benchmark) == []
    run_cpu(benchmark)
    assert not file.exists()
