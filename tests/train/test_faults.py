"""What becomes of a run of two ranks that is disturbed."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from small import losses, recipe

from dape.cli import main
from dape.errors import RankError
from dape.runs import RunFolder
from dape.train import faults
from dape.train.recipe import write
from dape.train.run import train
from dape.train.sections import Hardware

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LONG = {"training": {"steps": 60}}


def children(process):
    """Return the ranks that a launcher started, in their order."""
    task = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(task) as file:
        return sorted(map(int, file.read().split()))


@pytest.fixture(scope="module")
def disturbed(data, tmp_path_factory):
    """Return a run whose second rank was killed, and what the other ranks and a rival said."""
    folder = tmp_path_factory.mktemp("faults")
    often = {"checkpoint_every": 5, "validate_every": 60}
    settings = recipe(data, folder / "run", hardware={"strategy": "fsdp"}, tracking=often, **LONG)
    (folder / "recipe.yaml").write_text(write(settings))
    words = ["-m", "dape", "train", folder / "recipe.yaml"]
    process = subprocess.Popen([*LAUNCH, *words], stderr=subprocess.PIPE, text=True)
    while not RunFolder(folder / "run").saved_checkpoints():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)  # the launcher must not end the other rank before us
    first, second = children(process)
    os.kill(first, signal.SIGSTOP)
    rival = main(["train", str(folder / "recipe.yaml")])
    os.kill(second, signal.SIGKILL)
    for stopped in (first, process.pid):
        os.kill(stopped, signal.SIGCONT)
    begun = time.monotonic()
    shown = process.communicate(timeout=120)[1]
    return folder / "run", rival, shown, time.monotonic() - begun


def test_where_one_rank_is_killed_the_other_ends_with_a_line(disturbed):
    folder, _, shown, seconds = disturbed
    assert seconds < 60
    (line,) = [line for line in shown.splitlines() if line.startswith("dape: error")]
    assert (
        line.startswith("dape: error: rank 0 of 2: ") and "a process of the run has ended" in line
    )
    assert f"the same command trains {folder} on from step-" in line


def test_a_second_launch_of_a_run_is_refused(disturbed):
    _, rival, *_ = disturbed
    assert rival == 2


def test_a_killed_run_goes_on_with_fewer_ranks(disturbed, data, tmp_path):
    folder, *_ = disturbed
    train(recipe(data, folder, tracking={"validate_every": 60}, **LONG))
    train(recipe(data, tmp_path / "whole", tracking={"validate_every": 60}, **LONG))
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA"), "rank 1 of 2: out of memory: lower hardware.micro_batch"),
        (
            RuntimeError("gloo: Connection closed by peer"),
            "rank 1 of 2: a process of the run has ended",
        ),
    ],
)
def test_what_one_rank_meets_it_says_itself(tmp_path, error, line, monkeypatch, capsys):
    def fail(words):
        with faults.explained(RunFolder(tmp_path), Hardware(), rank=1, ranks=2):
            raise error

    monkeypatch.setattr("dape.cli._run", fail)
    monkeypatch.setenv("RANK", "1")
    assert main(["train"]) == 2
    assert f"dape: error: {line}" in capsys.readouterr().err


def test_what_all_ranks_meet_the_first_says(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_other_errors_stay_what_they_are(tmp_path):
    explained = faults.explained(RunFolder(tmp_path), Hardware(), rank=0, ranks=2)
    with pytest.raises(RuntimeError, match="a fault of the program"), explained:
        raise RuntimeError("a fault of the program")


def test_a_folder_that_is_slow_is_waited_for(tmp_path):
    late = tmp_path / "late"
    threading.Timer(0.2, late.mkdir).start()
    faults.wait_for(late, seconds=30.0)
    with pytest.raises(
        RankError, match=r"the first process sees .*never, and this process does not"
    ):
        faults.wait_for(tmp_path / "never", seconds=0.1)
