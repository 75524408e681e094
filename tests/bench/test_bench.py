"""`dape bench attention`: what it writes, what it records of failures, and what it refuses."""

import json
import re

import pytest
import torch
from cases import method

from dape import cli
from dape.bench import clock, methods
from dape.bench.record import load

TINY = ("--shape", "3x4", "--lengths", "6,12", "--tokens", "24", "--device", "cpu")


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    monkeypatch.setattr(clock, "BUDGET", 0)


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command; return its status, its folder and what it printed."""

    def bench(*words):
        out = tmp_path / "bench"
        status = cli.main(["bench", "attention", "--out", str(out), *TINY, *words])
        return status, out, capsys.readouterr()

    return bench


def add(monkeypatch, made):
    monkeypatch.setitem(methods.METHODS, made.name, made)


def failing(error, when=lambda direction: True):
    """A method that fails on some calls, and is right on the others."""

    def attend(right, *qkv):
        if when(torch.is_grad_enabled()):
            raise error
        return right(*qkv)

    return method(attend)


def test_the_table_the_screen_and_the_file_have_the_same_numbers(run):
    status, out, screen = run("--methods", "textbook,chunked,cuda", "--scheme", "kerple")
    assert status == 0
    results = load(out / "results.json")
    text = (out / "table.md").read_text()
    assert results.lengths == [6, 12]
    assert [entry.batch for entry in results.entries] == [4] * 8 + [2] * 8
    for length, part in zip(results.lengths, text.split("tokens**")[1:], strict=True):
        for name in ("sdpa", "textbook", "chunked"):
            row = re.search(rf"^\| {name} \| (.*) \|$", part, re.MULTILINE)[1].split(" | ")
            for at, direction in ((0, "forward"), (2, "forward + backward")):
                entry = results.entry(name, length, direction)
                base = results.entry("sdpa", length, direction)
                numbers = (entry.milliseconds, entry.milliseconds / base.milliseconds)
                for cell, number in zip(row[at : at + 2], numbers, strict=True):
                    assert float(cell.replace(",", "")) == pytest.approx(number, rel=5e-3)
            assert row[4:] == ["—", "—"]  # memory is a GPU's
        assert re.search(r"^\| cuda ( *\| —)+ \|$", part, re.MULTILINE)
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert all(name in screen.out for name in ("textbook", "chunked", "12 tokens"))


def test_the_file_says_what_was_measured_checked_and_by_which_command(run):
    _, out, screen = run("--methods", "textbook", "--seed", "7", "--dtype", "fp32")
    content = json.loads((out / "results.json").read_text())
    assert (content["seed"], content["dtype"], content["heads"], content["head_dim"]) == (
        7, "fp32", 3, 4,
    )  # fmt: skip
    made = content["provenance"]
    assert (
        made["command"].startswith("dape bench attention --out ") and "--seed 7" in made["command"]
    )
    assert made["versions"]["torch"] == torch.__version__ and made["device"].startswith("cpu")
    checked = {(each["method"], each["length"]) for each in content["checks"]}
    assert checked == {(name, length) for name in ("sdpa", "textbook") for length in (6, 12)}
    entry = content["entries"][-1]
    assert entry["runs"] == clock.FEWEST and entry["clock"] == "wall clock"
    assert entry["fastest"] <= entry["milliseconds"] <= entry["slowest"]
    lines = screen.err.splitlines()
    assert len(lines) == len(content["checks"]) + len(content["entries"]) == 16
    assert re.match(r"length 6  sdpa  forward  checked on 4 x 6: output is \d", lines[0])
    assert re.match(
        r"length 12  textbook  forward \+ backward  [\d.]+ ms  \(3 x 1, wall", lines[-1]
    )


def test_a_wrong_method_stops_everything_and_nothing_is_written(run, monkeypatch):
    add(monkeypatch, method(lambda right, *qkv: 1.1 * right(*qkv), name="made"))
    status, out, screen = run("--methods", "textbook,made")
    assert status == 2 and not out.exists() and " ms " not in screen.err + screen.out
    *_, last = screen.err.splitlines()
    assert re.match(
        r"dape: error: made is wrong at length 6, forward: output is 1\.\de-01 .* more than", last
    )


def test_what_runs_out_of_memory_in_one_direction_is_an_entry(run, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.00 GiB.")
    add(monkeypatch, failing(error, when=lambda training: training))
    status, out, screen = run("--methods", "made,textbook")
    assert status == 0 and "made  forward + backward  out of memory: OutOfMemoryError" in screen.err
    results = load(out / "results.json")
    assert results.entry("made", 12, "forward").milliseconds > 0
    full = results.entry("made", 12, "forward + backward")
    assert full.milliseconds is None and full.missing.kind == "out of memory"
    assert results.entry("textbook", 12, "forward + backward").milliseconds > 0
    assert re.search(r"\| made \| [\d.]+ \| [\d.]+ \| OOM \| — \|", (out / "table.md").read_text())


def test_a_failure_while_timing_is_an_entry_and_the_others_go_on(run, monkeypatch):
    counted = []

    def later(training):
        counted.append(training)
        return len(counted) > 4  # checked twice in each direction

    add(monkeypatch, failing(RuntimeError("misaligned address"), when=later))
    status, out, _ = run("--methods", "made,textbook")
    results = load(out / "results.json")
    assert status == 0
    failed = results.entry("made", 6, "forward")
    assert (failed.missing.kind, failed.milliseconds) == ("failed", None)
    assert failed.missing.reason == "RuntimeError: misaligned address"
    assert results.entry("textbook", 12, "forward").milliseconds > 0
    assert "| made | failed | — | failed | — |" in (out / "table.md").read_text()


def test_what_could_not_be_checked_is_not_timed(run, monkeypatch):
    counted = []

    def at_first(training):
        counted.append(training)
        return len(counted) == 1

    add(monkeypatch, failing(RuntimeError("once"), when=at_first))
    _, out, _ = run("--methods", "made")
    results = load(out / "results.json")
    assert results.entry("made", 6, "forward").missing.reason == "RuntimeError: once"
    assert results.entry("made", 6, "forward + backward").missing is None
    assert results.entry("made", 12, "forward").missing is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "`dape bench` needs a further word: attention"),
        (("atention",), "unknown command after `dape bench`: 'atention'; did you mean 'attention'"),
        (("attention", "--scheme", "kerpel"), "did you mean 'kerple'?"),
        (("attention", "--shape", "124m"), "shape '124m' is neither one of 125m"),
        (("attention", "--methods", "cudda"), "unknown method 'cudda'; did you mean 'cuda'?"),
        (("attention", "--lengths", "1,8"), "--lengths 1: must be at least 2"),
        (("attention", "--lengths", "8,x"), "'8,x' is not a list of lengths"),
        (("attention", "--tokens", "0"), "--tokens 0: must be at least 1"),
        (("attention", "--dtype", "fp8"), "fp8"),
        (("attention", "--device", "meta"), "--device meta: it computes nothing; use cpu"),
        (("attention", "--lenghts", "8"), "did you mean '--lengths'?"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not list(tmp_path.iterdir())


def test_help_names_every_method(capsys):
    assert cli.main(["bench", "--help"]) == 0 and "dape bench attention" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["bench", "attention", "--help"])
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert ", ".join(methods.METHODS) in page
