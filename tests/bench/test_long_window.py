"""`benchmarks/long_window.py` on one and two CPU processes."""

import json
import shlex

import pytest

from dape import cli
from dape.errors import UserError
from folders import make_run, prepare
from forked import instead_of


@pytest.fixture(scope="module")
def module(benchmarks):
    return benchmarks("long_window")


def entry(processes, **losses):
    found = [{"length": int(n[1:]), "loss": x, "perplexity": 1.0} for n, x in losses.items()]
    return {"processes": processes, "command_seconds": 1.0, "measurements": found}


def test_one_process_and_two_have_the_same_perplexity(module, tmp_path, monkeypatch, capsys):
    """The single one is this process, which has dape imported, and the two are forked from one."""
    start = module.launch.run

    def run(words, log, seconds):
        if words[1:3] == ["-m", "dape"]:
            assert not cli.main(words[3:])
        else:
            start(instead_of(words), log, seconds)

    monkeypatch.setattr(module.launch, "run", run)
    folder = make_run(tmp_path / "run", prepare(tmp_path), "dape-kerple")
    out = tmp_path / "out.json"
    sizes = ["--gpus", "2", "--lengths", "33,64", "--stride", "24", "--split", "test"]
    words = [str(folder), *sizes, "--out", str(out)]
    module.main(words)
    one, two = json.loads(out.read_text())
    command = shlex.join(["python", "benchmarks/long_window.py", *words])
    assert [each["provenance"]["command"] for each in (one, two)] == [command] * 2
    assert [each["processes"] for each in (one, two)] == [1, 2]
    assert one["targets"] == two["targets"] and one["targets"]["tokens"] == [24]
    for before, after in zip(one["measurements"], two["measurements"], strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| 33", "1"], ["| 64", "1"], ["| 33", "2"], ["| 64", "2"],
    ]  # fmt: skip


def test_a_difference_and_a_lacking_length_are_named(module):
    one = entry(1, _8=2.0, _16=1.0)
    assert module.unequal([one, entry(2, _8=2.0 + 5e-6, _16=1.0)], 1e-5) == []
    assert module.unequal([one, entry(2, _8=2.0, _16=1.0 + 2e-5)], 1e-5) == [16]
    assert module.unequal([one, entry(2, _8=float("nan"))], 1e-5) == [8, 16]


def test_a_command_that_fails_is_a_line(module, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("no room")

    monkeypatch.setattr(module.launch, "run", fail)
    with pytest.raises(SystemExit, match=r"^error: no room$"):
        module.main([str(tmp_path), "--out", str(tmp_path / "out.json")])
