"""Earlier results in a folder: which are used again, and which process writes."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from dape.evaluate.record import load
from dape.evaluate.results import Kept, precisions, repeats
from dape.evaluate.subject import Model
from dape.evaluate.watch import Watch
from dape.runs import RunFolder, unfinished
from evaluations import PROVENANCE, make

ORIGIN = PROVENANCE | {"precision": "fp32", "limit": 10, "tasks": "abc"}


def model(weights="w", run="runs/kerple-0"):
    return Mock(spec=Model, weights=weights, folder=RunFolder(Path(run)))


def record(origin=ORIGIN, weights="w", lengths=(128,)):
    made = make("kerple", [2.0] * len(lengths), lengths=lengths, provenance=origin)
    return replace(made, subject=replace(made.subject, weights=weights))


def test_a_result_is_that_of_a_repetition_where_model_code_device_and_settings_agree():
    assert repeats(record(), model(), ORIGIN)
    assert repeats(record(ORIGIN | {"time": "then", "command": "another"}), model(), ORIGIN)
    others = {
        "commit": "def",
        "versions": {"python": "3.11", "torch": "2.14"},
        "device": "NVIDIA H200",
        "precision": "bf16",
        "limit": None,
        "tasks": "def",
    }
    for name, value in others.items():
        assert not repeats(record(), model(), ORIGIN | {name: value}), name
    assert not repeats(record(), model(weights="v"), ORIGIN)
    assert not repeats(record(), model(run="elsewhere/kerple-0"), ORIGIN)
    assert not repeats(record(weights=None), model(weights=None), ORIGIN), "a module in memory"


def test_the_whole_record_and_the_unfinished_one_are_found_again(tmp_path):
    kept = Kept(tmp_path / "last.json", load)
    assert kept.before(model(), ORIGIN, lambda each: True) == []
    whole, part = record(lengths=(128, 256)), record()
    kept.finish(whole)
    kept.keep(part)
    assert kept.before(model(), ORIGIN, lambda each: True) == [whole, part]
    assert kept.before(model(), ORIGIN, lambda each: len(each.lengths) == 1) == [part]
    assert kept.before(model(weights="v"), ORIGIN, lambda each: True) == []
    kept.file.write_text("{")
    assert kept.before(model(), ORIGIN, lambda each: True) == [part]
    kept.finish(whole)
    assert load(kept.file) == whole and not unfinished(kept.file).exists()


def test_only_the_first_process_writes_and_notes_and_without_a_file_nobody(tmp_path):
    told = []
    watch = Mock(spec=Watch, note=told.append)
    file = tmp_path / "last.json"
    for kept in (Kept(file, load, writes=False), Kept(None, load)):
        kept.keep(record())
        kept.finish(record())
        assert not [*tmp_path.iterdir()]
    Kept(file, load).finish(record())
    asked = (model(), watch, ORIGIN | {"precision": "bf16"}, lambda each: True)
    Kept(file, load, writes=False).note_lost(*asked)
    Kept(None, load).note_lost(*asked)
    assert told == []
    Kept(file, load).note_lost(*asked)
    assert [note.split(",")[0] for note in told] == [f"{file} has other tokens"]
    again = record(ORIGIN | {"commit": "another"})
    Kept(file, load).finish(again)
    assert Kept(file, load, writes=False).before(model(), again.provenance, lambda _: True)


@pytest.mark.parametrize(
    ("trained", "foreign", "expected"),
    [
        (["bf16", "fp32"], ["fp32"], ["bf16", "fp32", "bf16"]),
        (["fp32"], ["fp32"], ["fp32", "fp32"]),
        ([], ["fp32", "bf16"], ["bf16", "bf16"]),
    ],
)
def test_a_model_of_others_has_the_precision_of_products_of_the_models_beside(
    trained, foreign, expected
):
    models = [
        Mock(spec=Model, recipe=recipe, precision=lambda device, asked, own=own: own)
        for recipe, group in (({}, trained), (None, foreign))
        for own in group
    ]
    assert precisions(models, torch.device("cpu")) == expected
