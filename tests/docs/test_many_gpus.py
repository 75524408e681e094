"""The commands of docs/many-gpus.md, on two processes and a small model; its table of costs."""

import re

import pytest
from huggingface_hub import ModelCard
from pages import ROOT, execute, small_recipe, text
from safetensors.numpy import load_file

from dape.train.plan import cost
from dape.train.recipe import Recipe, read

PAGE = "docs/many-gpus.md"
ROW = r"^\| `(\S+)` \| (\d) \| (\w+) \| (\S+) \| (\S+) \|$"
ROWS = re.findall(ROW, text(PAGE), flags=re.MULTILINE)


def test_two_processes_train_in_shards_and_the_export_is_whole(tmp_path, monkeypatch):
    for split in ("train", "validation", "test"):
        (tmp_path / "books" / split).mkdir(parents=True)
        (tmp_path / "books" / split / "book.txt").write_text("a book of words " * 400)
    training = {"length": 16, "batch_size": 4, "steps": 2}
    hardware = {"device": "cpu", "micro_batch_size": 1, "compile": "none"}
    small_recipe("2.7b.yaml", tmp_path, training=training, hardware=hardware)
    monkeypatch.chdir(tmp_path)
    execute(PAGE)
    run, exported = tmp_path / "runs" / "2.7b-dape-kerple", tmp_path / "2.7b-dape-kerple"
    shards = {file.name for file in (run / "checkpoints" / "step-00000002").glob("*.distcp")}
    assert shards == {"__0_0.distcp", "__1_0.distcp"}
    expected = load_file(run / "model" / "model.safetensors")
    found = load_file(exported / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)
    assert "| hardware | 2 x cpu" in ModelCard.load(exported / "README.md").text


@pytest.mark.parametrize("name, gpus, strategy, parameters, memory", ROWS)
def test_a_row_of_costs_is_what_the_dry_run_prints(name, gpus, strategy, parameters, memory):
    recipe = read(ROOT / "recipes" / f"{name}.yaml", Recipe)
    printed = cost(recipe, int(gpus))
    assert f"parameters  {parameters} " in printed
    assert f"memory      about {memory} GiB on each device" in printed
    assert recipe.hardware.strategy == strategy


def test_there_is_a_row_for_each_of_the_papers_sizes():
    assert {row[0] for row in ROWS} == {"125m", "350m", "2.7b", "6.7b"}
