"""`benchmarks/large_run.py` on two CPU ranks, and the report on its record."""

import json

import pytest

from dape import cli
from dape.evaluate import evaluate
from dape.runs import RunFolder
from dape.train.recipe import Recipe, write
from dape.train.sections import Hardware, Model, Training
from folders import prepare
from forked import instead_of


@pytest.fixture(scope="module")
def module(benchmarks):
    return benchmarks("large_run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a corpus and a recipe."""
    folder = tmp_path_factory.mktemp("large")
    prepare(folder)
    recipe = Recipe(
        model=Model(hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
        training=Training(length=16, batch_size=8, precision="fp32"),
        hardware=Hardware(device="cpu", strategy="fsdp"),
    )
    (folder / "tiny.yaml").write_text(write(recipe))
    return folder


def words(folder, *changes):
    out = ["--folder", folder / "runs", "--out", folder / "record.json", "--gpus", 2]
    every = ["--training.steps", 40, "--tracking.checkpoint_every", 20]
    every += ["--tracking.validate_every", 20, "--optimizer.learning_rate", 1e-2]
    given = [folder / "tiny.yaml", "--data", folder / "data", "--lengths", "16,32"]
    return [str(each) for each in (*given, *out, *every, *changes)]


def in_this_process(module):
    """Return `Work.command` for a process that has dape imported, and starts ranks by forking."""
    begin = module.Work.command

    def command(self, phase, *words):
        if words[:3] == module.DAPE:
            assert not cli.main([str(each) for each in words[3:]])
            return ""
        if phase == "load":
            return json.dumps(module.loaded(words[3]))
        assert phase == "resume"  # the phase before starts torchrun itself, and kills its processes
        return begin(self, phase, *instead_of(words))

    return command


@pytest.fixture(scope="module")
def record(module, folder):
    """Return the record of all phases."""
    work = module.prepared(*module.parser().parse_known_args(words(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Work, "command", in_this_process(module))
        module.follow(work, module.begun(work, 2), folder / "record.json")
    return json.loads((folder / "record.json").read_text())


def test_the_killed_run_goes_on_exactly(record):
    first, second = record["phases"]["train"], record["phases"]["resume"]
    assert first["processes"] == 3, "the launcher and two ranks"
    assert second["from"] == first["checkpoint"] == 20
    assert [row["step"] for row in second["metrics"]] == [*range(1, 41)]
    assert len(second["repeated"]) >= 5 and second["differing"] == []
    for row in second["repeated"]:
        assert row["loss"][0] == first["metrics"][row["step"] - 1]["loss"] == row["loss"][1]
    losses = [row["loss"] for row in second["metrics"]]
    assert losses[-1] < 0.7 * losses[0]


def test_the_exported_model_is_the_trained_one(record, folder):
    phases = record["phases"]
    assert phases["load"]["class"] == "DapeForCausalLM"
    assert phases["load"]["dtypes"] == ["torch.bfloat16", "torch.float32"], "positions stay exact"
    run = RunFolder(folder / "runs" / "tiny" / "run")
    (expected,) = evaluate(run, lengths=[16, 32], out=folder / "evaluation")
    assert phases["evaluate"]["loss"] == {
        str(each.length): pytest.approx(each.loss, rel=1e-6) for each in expected.measurements
    }


def test_the_report_has_the_numbers_of_the_record(benchmarks, record, folder):
    report = benchmarks("large_run_report")
    report.main([str(folder / "record.json"), "--out", str(folder / "runs")])
    lines = (folder / "runs.md").read_text().splitlines()[2:]
    rows = dict(line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines)
    second = record["phases"]["resume"]
    metrics = second["metrics"]
    assert rows["loss at step 40"] == f"{metrics[39]['loss']:.3f}"
    assert rows["validation loss at step 20"] == f"{metrics[19]['validation_loss']:.3f}"
    assert rows["steps done twice"].endswith("all equal bit for bit")
    assert rows["perplexity at 32"] == f"{record['phases']['evaluate']['perplexity']['32']:.2f}"
    (axes,) = report.draw([record]).axes
    assert axes.lines[0].get_ydata().tolist() == [row["loss"] for row in metrics]
    assert axes.lines[2].get_xdata() == [20, 20]
    other = {"repeated": [{"loss": [2.0, 2.0002]}], "differing": [31], "seconds": 1}
    differing = report.table(
        [{**record, "phases": {**record["phases"], "resume": {**second, **other}}}]
    )
    assert "| steps done twice | 1, 1 differ, losses by at most 1e-04 |" in differing
    assert report.table([{**record, "phases": {}}]).count("\n") == 3, "no phase, one row"


def test_a_different_loss_is_named(module, record, monkeypatch, tmp_path):
    """The record says which steps; a run from another step than the checkpoint fails."""
    metrics = record["phases"]["resume"]["metrics"]
    other = [{**row, "loss": row["loss"] + (row["step"] == 23) * 1e-6} for row in metrics]
    run = type("Run", (), {"read_metrics": lambda self: other})()
    work = type("Work", (), {"run": run, "training": [], "recipe": None})()
    work.recipe = Recipe(training=Training(steps=40))
    work.command = lambda *_: "from step 20"
    assert module.resume(work, record)["differing"] == [23]
    work.command = lambda *_: "from step 0"
    with pytest.raises(module.UserError, match=r"went on from step \[0\]"):
        module.resume(work, record)


def test_the_folder_goes_and_a_difference_ends_with_an_error(module, folder, tmp_path, monkeypatch):
    different: list[int] = []
    monkeypatch.setattr(module, "PHASES", {"resume": lambda *_: {"differing": different}})
    given = words(folder, "--folder", tmp_path / "runs", "--out", tmp_path / "record.json")
    module.main(given)
    assert not (tmp_path / "runs" / "tiny").exists()
    different.append(23)
    with pytest.raises(SystemExit, match=r"^error: steps \[23\], done twice, differ"):
        module.main(given)


def test_a_phase_that_fails_leaves_those_before_it(module, folder, tmp_path, monkeypatch, capsys):
    def fail(work, record):
        raise module.UserError("no room")

    phases = {"train": lambda work, record: {"checkpoint": 1}, "resume": fail}
    monkeypatch.setattr(module, "PHASES", phases)
    given = words(folder, "--folder", tmp_path, "--out", tmp_path / "record.json")
    with pytest.raises(SystemExit, match=r"^error: resume: no room \(.*resume.log\)$"):
        module.main(given)
    found = json.loads((tmp_path / "record.json").read_text())
    assert found["phases"]["train"]["checkpoint"] == 1
    assert found["failed"] == {"resume": "no room", "metrics": []}


def test_a_folder_without_room_is_refused(module, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Disk", (), {"free": 1000}))
    with pytest.raises(SystemExit, match=r"needs 0 GB for 15,276 parameters, and 0 GB are free"):
        module.main(words(folder, "--folder", tmp_path))
