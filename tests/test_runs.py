import glob
import json
import math
import os
from pathlib import Path

import pytest

from dape.errors import UserError
from dape.runs import RunFolder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_layout_on_disk_stays():
    run = RunFolder(Path("runs/x"))
    named = [run.recipe, run.record, run.metrics, run.checkpoint(12), run.model, run.adapters]
    named += [run.tensorboard, run.evaluation("last"), run.evaluation("sliding", 64, "validation")]
    named += [run.retrieval("passkey"), run.harness("wikitext", 512)]
    assert [path.relative_to("runs/x").as_posix() for path in named] == [
        *("config.yaml", "run.json", "metrics.jsonl", "checkpoints/step-00000012"),
        *("model", "adapters", "tensorboard", "evaluation/last.json"),
        *("evaluation/sliding-64-validation.json", "retrieval/passkey.json"),
        "harness/wikitext-512.json",
    ]
    assert str(run) == os.fspath(run) == "runs/x"


def test_an_absent_run_is_none(tmp_path):
    run = RunFolder(tmp_path / "absent")
    assert not run.exists and not run.finished and not run.has_model
    assert run.latest_checkpoint is None and run.read_record() == {} and run.read_metrics() == []
    assert run.evaluations() == run.retrievals() == []
    with pytest.raises(UserError, match=r"cannot read .*config.yaml: No such file"):
        run.read_recipe()


def test_a_folder_that_goes_while_it_is_listed_holds_nothing(tmp_path, monkeypatch):
    """A refused measurement removes the folder that its lock made."""
    run, scandir = RunFolder(tmp_path), os.scandir
    for name in ("evaluation", "retrieval", "checkpoints"):
        (tmp_path / name).mkdir()

    def late(path):
        os.rmdir(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", late)
    if globber := getattr(glob, "_StringGlobber", None):  # Python 3.13 has a name of its own
        monkeypatch.setattr(globber, "scandir", staticmethod(late))
    assert run.evaluations() == run.retrievals() == run.saved_checkpoints() == []
    assert not os.listdir(tmp_path)


def test_a_run_says_how_far_it_is(tmp_path):
    run = RunFolder(tmp_path)
    write(run.recipe, "{data: a, seed: 0, model: {scheme: alibi}, training: {}, optimizer: {}}")
    assert run.exists and not run.finished and not run.is_retrofit
    for name in ("step-00000009", "step-00000010", "step-00000011.partial", "step-1"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.saved_checkpoints() == [run.checkpoint(10), run.checkpoint(9)]
    assert run.latest_checkpoint == run.checkpoint(10)
    write(run.record, json.dumps({"ended": None}))
    assert not run.finished
    write(run.record, json.dumps({"ended": "2026-01-01", "step": 6}))
    assert run.finished and run.read_record()["step"] == 6
    write(run.recipe, run.recipe.read_text().replace("scheme: alibi", "base: gpt2"))
    assert run.is_retrofit
    write(run.model / "config.json", "{}")
    assert run.has_model


@pytest.mark.parametrize("text", ["{}", "model: {scheme: alibi}", "{data: a, seed: abc}"])
def test_a_recipe_without_what_a_run_writes_is_damaged(tmp_path, text):
    run = RunFolder(tmp_path)
    write(run.recipe, text)
    with pytest.raises(UserError, match=r"config\.yaml is damaged \((data is missing|seed='abc')"):
        run.read_recipe()


def test_a_recipe_that_cannot_be_read_is_no_absent_run(tmp_path):
    run = RunFolder(tmp_path)
    run.recipe.symlink_to(run.recipe)
    assert run.exists
    with pytest.raises(UserError, match=r"cannot read .*config\.yaml"):
        run.read_recipe()


def test_a_cut_last_line_of_the_metrics_is_left_out(tmp_path):
    run = RunFolder(tmp_path)
    write(run.metrics, '{"step": 1}\n{"step": 2}\n{"st')
    assert run.read_metrics() == [{"step": 1}, {"step": 2}]
    write(run.metrics, '{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged"):
        run.read_metrics()


def test_a_damaged_record_is_named(tmp_path):
    run = RunFolder(tmp_path)
    write(run.record, '{"ended": ')
    with pytest.raises(UserError, match=r"run.json is not JSON .*; run the command"):
        run.finished  # noqa: B018


@pytest.mark.parametrize("line", ["{}", "null", "[1]", '{"step": "a"}', "[" * 100_000])
def test_metrics_without_steps_are_damaged(tmp_path, line):
    run = RunFolder(tmp_path)
    write(run.metrics, f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        run.read_metrics()


def test_a_loss_that_is_not_finite_is_null_in_the_file_and_nan_for_a_reader(tmp_path):
    run = RunFolder(tmp_path)
    run.update_record({"loss": math.nan, "validation_loss": math.inf, "step": 3})
    write(run.metrics, run.record.read_text().replace("\n", "") + "\n")
    assert json.loads(run.record.read_text(), parse_constant=pytest.fail)["loss"] is None
    for found in (run.read_record(), *run.read_metrics()):
        assert found["step"] == 3
        assert math.isnan(found["loss"]) and math.isnan(found["validation_loss"])


def test_a_part_of_a_record_that_is_null_is_none_and_other_kinds_are_damage(tmp_path):
    run = RunFolder(tmp_path)
    write(run.record, json.dumps({"data": None, "versions": {}, "commit": None}))
    assert run.read_record() == {"versions": {}, "commit": None}
    write(run.record, json.dumps({"data": "a"}))
    with pytest.raises(UserError, match=r"run\.json: data='a': expected a mapping; run"):
        run.read_record()
