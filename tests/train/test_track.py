import json
import math

import pytest
from small import metrics, recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dape.errors import UserError
from dape.train import track
from dape.train.track import Reporter, Tracker


def entry(step, loss=1.0):
    return {"step": step, "loss": loss}


def log(settings, done, steps):
    tracker = Tracker(settings, done)
    for step in steps:
        tracker.log(entry(step, loss=step / 2))
    tracker.close()


def test_a_resumed_run_has_each_step_once(tmp_path):
    settings = recipe("data", tmp_path)
    log(settings, 0, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    log(settings, 2, [3, 4, 5])
    assert metrics(tmp_path) == [entry(step, step / 2) for step in (1, 2, 3, 4, 5)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [
        (step, step / 2) for step in (1, 2, 3, 4, 5)
    ]


def test_a_loss_that_is_not_finite_is_null_also_after_a_resumption(tmp_path):
    settings = recipe("data", tmp_path)
    for done in (0, 1):
        tracker = Tracker(settings, done)
        tracker.log({"step": done + 1, "loss": 1.0, "validation_loss": math.nan})
        tracker.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert found == [{"step": n, "loss": 1.0, "validation_loss": None} for n in (1, 2)]


def test_a_new_run_begins_with_nothing(tmp_path):
    settings = recipe("data", tmp_path)
    log(settings, 0, [1])
    log(settings, 0, [])
    assert metrics(tmp_path) == []


def report(settings, ceiling, speeds):
    """Report updates that took so many seconds each, of which every second is logged."""
    with Reporter(settings, 0, tokens=128, ceiling=ceiling) as reporter:
        for step, seconds in enumerate(speeds, start=1):
            update = entry(step) | {"update_seconds": seconds}
            reporter.step(update, due=step % 2 == 0)


def test_speed_is_that_since_the_last_line(tmp_path, capsys):
    settings = recipe("data", tmp_path, training={"batch_size": 4, "length": 32})
    report(settings, ceiling=1280.0, speeds=[0.5, 0.3, 0.1, 0.3])
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    assert [line["tokens_per_second"] for line in lines] == pytest.approx([320, 640])
    assert [line["mfu"] for line in lines] == pytest.approx([0.25, 0.5])
    assert "update_seconds" not in lines[0]
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1, "lines come at intervals where there is no terminal"
    assert shown[0].startswith("step 2/6  loss 1.0000  320 tokens/s  MFU 25%  0:00:0")


def test_without_a_known_peak_there_is_no_utilisation(tmp_path, capsys):
    report(recipe("data", tmp_path), ceiling=None, speeds=[1.0, 1.0])
    assert "mfu" not in metrics(tmp_path)[0] and "MFU" not in capsys.readouterr().out


def test_a_validation_is_always_shown(tmp_path, capsys):
    with Reporter(recipe("data", tmp_path), 0, tokens=128, ceiling=None) as reporter:
        for step in (1, 2, 3):
            update = entry(step) | {"update_seconds": 1.0, "validation_loss": 2.5}
            reporter.step(update, due=True)
    assert capsys.readouterr().out.count("validation 2.5000") == 3


def test_metrics_are_flushed_line_by_line(tmp_path):
    tracker = Tracker(recipe("data", tmp_path), 0)
    tracker.log(entry(1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == entry(1)
    tracker.close()


def test_a_service_that_is_not_installed_is_named():
    settings = recipe("data", "out", tracking={"service": "wandb"})
    with pytest.raises(UserError, match=r"service='wandb' is not installed; run `pip install wan"):
        track.check(settings)
    track.check(recipe("data", "out"))
