"""`dape chomsky`: its tables, examples, runs and mistakes."""

import re

import pytest

from dape import cli
from dape.chomsky.tasks import TASKS

SMALL = """
tasks: [even-pairs]
schemes: [kerple, dape-alibi]
seeds: [0, 1]
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, adapter_hidden: 4}
training: {steps: 3, batch_size: 4, length: 4}
evaluation: {longest: 8, samples: 4}
"""


def dape(*words):
    return cli.main(["chomsky", *map(str, words)])


def refused(capsys, *words):
    assert dape(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_every_task_is_listed(capsys):
    assert not dape("tasks")
    text = capsys.readouterr().out
    assert all(re.search(rf"^ *{name} ", text, flags=re.MULTILINE) for name in TASKS)
    row = next(line for line in text.splitlines() if "bucket-sort" in line)
    assert row.split()[1:] == ["context-sensitive", "no", "5", "5", "40", "500", "20.0", "90.1"]


@pytest.mark.parametrize("name", TASKS)
def test_examples_can_be_checked(capsys, name):
    assert not dape("sample", name, "--length", 11, "--count", 4)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4
    for line in lines:
        given, answer = (part.split() for part in line.split(" -> "))
        assert len(given) == 11
        inputs = [TASKS[name].inputs.index(symbol) for symbol in given]
        assert [TASKS[name].outputs.index(symbol) for symbol in answer] == TASKS[name].solve(inputs)


def test_cells_and_a_table_of_them(tmp_path, capsys):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(SMALL)
    train = ("train", recipe, "--out", out, "--device", "cpu")
    assert not dape(*train, "--schemes", "kerple", "--seeds", 5, "--training.steps", 3)
    assert [file.name for file in out.glob("cells/*/*")] == ["kerple-5.json"]
    assert not dape(*train, "--together", 2)
    text = capsys.readouterr().out
    assert "4 models to train on cpu" in text and "even-pairs kerple  step 3/3  loss" in text
    assert not dape(*train)
    assert "0 models to train" in capsys.readouterr().out
    table = ("table", recipe, "--out", out)
    assert not dape(*table)
    assert f"wrote {out / 'table.md'}" in capsys.readouterr().out
    written = (out / "table.md").read_text()
    assert f"dape chomsky table {recipe}" in written and "| even-pairs | 50.0 |" in written
    assert not dape(*table, "--schemes", "kerple")
    assert "dape-alibi" not in (out / "table.md").read_text().split("\n\n")[2]


def test_mistakes_are_one_line(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SMALL)
    assert "`dape chomsky` needs a further word: tasks, sample, train, table" in refused(capsys)
    assert "'tabel'; did you mean 'table'" in refused(capsys, "tabel")
    assert "name a recipe first" in refused(capsys, "train")
    assert "nothing.yaml" in refused(capsys, "train", tmp_path / "nothing.yaml")
    assert "unknown task 'sort'" in refused(capsys, "train", recipe, "--tasks", "sort")
    assert "--count 0" in refused(capsys, "sample", "even-pairs", "--count", 0)
    assert "--length 0" in refused(capsys, "sample", "even-pairs", "--length", 0)
    assert "no finished cell" in refused(capsys, "table", recipe, "--out", tmp_path / "none")
    assert "--together 0" in refused(capsys, "train", recipe, "--together", 0)
