"""`dape train --measure`: what a recipe takes, without data."""

import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from small import recipe

from dape.cli import main
from dape.train import measure
from dape.train.loop import Session
from dape.train.measure import GIB, Reading
from dape.train.recipe import write

VOCABULARY = {"model": {"vocab_size": 64}}


def settings(tmp_path):
    return recipe(str(tmp_path / "nowhere"), tmp_path / "run", **VOCABULARY)


def test_every_size_of_micro_batch_is_measured(tmp_path):
    found = list(measure.measure(settings(tmp_path), steps=1))
    assert [each.micro_batch_size for each in found] == [1, 2, 4, 8]
    for each in found:
        assert each.tokens_per_second == pytest.approx(8 * 16 / each.seconds, rel=1e-4)
        assert each.gib is None and each.mfu is None
    assert not list(tmp_path.iterdir()), "a measurement leaves nothing"


def test_chosen_sizes_are_measured_up_to_the_first_that_will_not_fit(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(measure, "_fits", lambda found, n, device: asked.append(n) or n < 8)
    found = list(measure.measure(settings(tmp_path), sizes=[2, 4, 8, 16], steps=2))
    assert [each.micro_batch_size for each in found] == [2, 4] and asked == [2, 4, 8]
    assert [len(each.updates) for each in found] == [2, 2]


def test_a_reading_is_a_line_with_what_a_device_measures():
    words = "micro_batch_size 2  3.2 GiB  1,001 tokens/s  0.50 s a step  MFU 41%"
    assert str(Reading(2, 0.5, 1000.6, 3.21, 0.414)) == words
    assert (
        str(Reading(2, 0.5, 1000.6, None, None))
        == "micro_batch_size 2  1,001 tokens/s  0.50 s a step"
    )


def test_the_command_names_the_fastest(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(write(settings(tmp_path)))
    assert main(["train", str(file), "--measure"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    speeds = {}
    for line in lines:
        size, speed = re.match(
            r"micro_batch_size (\d+)  ([\d,]+) tokens/s  .* s a step", line
        ).groups()
        speeds[size] = int(speed.replace(",", ""))
    assert speeds[last.removeprefix("the fastest: --hardware.micro-batch-size ")] == max(
        speeds.values()
    )


def test_a_size_that_memory_cannot_hold_is_not_tried(monkeypatch):
    """10 and 16 GiB with 1 and 2 sequences: 4 take 28 GiB, and 8 take 52."""
    total = type("Properties", (), {"total_memory": 40 * GIB})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: total)
    gpu = torch.device("cuda")
    found = [Reading(1, 1.0, 1.0, 10.0, None), Reading(2, 1.0, 1.0, 16.0, None)]
    assert [measure._fits(found, size, gpu) for size in (4, 5, 6, 8)] == [True, True, False, False]
    twice = [Reading(2 * each.micro_batch_size, 1.0, 1.0, each.gib, None) for each in found]
    three = [Reading(1, 1.0, 1.0, 1.0, None), *twice]
    assert measure._fits(three, 8, gpu) and not measure._fits(three, 16, gpu), "by the last two"
    assert measure._fits(found[:1], 8, gpu) and measure._fits(found, 8, torch.device("cpu"))


def test_the_slowest_and_the_fullest_of_several_gpus_count(monkeypatch):
    """Of four, another one takes twice as long as this one, and three times the memory."""
    worst = iter((2.0, 3.0))
    fabric = SimpleNamespace(
        device=torch.device("cuda"),
        world_size=4,
        all_reduce=lambda value, reduce_op: {"max": next(worst)}[reduce_op] * value,
    )
    task = SimpleNamespace(tokens=1000, flops=lambda model: 10**9)
    monkeypatch.setattr(torch, "tensor", lambda value, device: value)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 5 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    times = [{"update_seconds": each} for each in (9.0, 9.0, 1.0, 1.5, 4.0)]
    monkeypatch.setattr(measure, "updates", lambda session: times)
    session = Mock(spec=Session, fabric=fabric, task=task, model=None)
    found = measure._reading(session, size=7, warm_up=2)
    seconds = 2 * 1.5
    mfu = 1000 / seconds * 1e9 / (4 * 312e12)  # of four A100 by their data sheet
    expected = (7, seconds, 1000 / seconds, 15.0, mfu)
    given = (found.micro_batch_size, found.seconds, found.tokens_per_second, found.gib, found.mfu)
    assert given == pytest.approx(expected)
    assert found.updates == (1.0, 1.5, 4.0)


def test_random_tokens_differ_between_steps_and_devices_and_are_of_the_recipe(tmp_path):
    task = measure.RandomTokens(settings(tmp_path))
    batches = [task.batch("train", step, rank, 2)[0] for step in (0, 1) for rank in (0, 1)]
    assert {each.shape for each in batches} == {(4, 17)}
    assert 0 <= min(each.min() for each in batches) < max(each.max() for each in batches) < 64
    assert len({str(each.tolist()) for each in batches}) == 4
    assert torch.equal(task.batch("train", 1, 0, 2)[0], batches[2]), "at every draw"
    assert task.tokens == 8 * 16


def test_where_memory_ends_on_one_device_the_sizes_before_stand(tmp_path, monkeypatch):
    def updates(session):
        if session.recipe.hardware.micro_batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        for seconds in (1.0, 0.5, 0.7, 0.25):
            yield {"update_seconds": seconds}

    monkeypatch.setattr(measure, "updates", updates)
    found = list(measure.measure(settings(tmp_path)))
    assert [(each.micro_batch_size, each.seconds) for each in found] == [(1, 0.5), (2, 0.5)]
    assert [len(each.updates) for each in found] == [3, 3]
    assert found[0].updates == (0.5, 0.7, 0.25), "without the first, in which kernels are compiled"


def test_another_failure_than_of_memory_is_no_end_of_the_sizes(tmp_path, monkeypatch):
    def updates(session):
        if session.recipe.hardware.micro_batch_size > 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield from ({"update_seconds": 1.0} for _ in range(session.recipe.training.steps))

    monkeypatch.setattr(measure, "updates", updates)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(measure.measure(settings(tmp_path)))
