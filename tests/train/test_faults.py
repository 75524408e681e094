"""What becomes of a run of two ranks that is disturbed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import losses, recipe

from dape.cli import main
from dape.errors import RankError, UserError, behind
from dape.runs import RunFolder
from dape.train import estimate, faults, graphs, parallelize
from dape.train.plan import check_memory
from dape.train.recipe import write
from dape.train.run import train
from dape.train.sections import Hardware

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LONG = {"training": {"steps": 60}}


def children(process):
    """Return the ranks that a launcher started, in their order."""
    task = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(each) for each in task.read_text().split()]


def has_ended(process):
    """Return whether a process has ended that its parent, which is stopped, has not waited for."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


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
    os.kill(first, signal.SIGCONT)
    begun = time.monotonic()
    while not has_ended(first) and time.monotonic() < begun + 60:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGCONT)
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
        (MemoryError(), "rank 1 of 2: out of memory: lower hardware.micro_batch"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "rank 1 of 2: out of memory: lower hardware.micro_batch",
        ),
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


def test_what_a_machine_meets_its_first_rank_says(monkeypatch, capsys):
    """The file may be absent on the second machine alone."""
    for rank, local, shown in ("8", "0", True), ("9", "1", False):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert main(["train", "nowhere.yaml"]) == 2
        assert ("nowhere.yaml" in capsys.readouterr().err) == shown


def test_a_corpus_or_recipe_unlike_that_of_the_first_rank_is_refused(data, tmp_path, monkeypatch):
    """Each rank would read batches of its own, or make updates of its own."""
    same, other = recipe(data, tmp_path / "run"), {"path": data, "checksum": "0" * 64}
    faster = recipe(data, tmp_path / "run", optimizer={"learning_rate": 0.5})
    for changed, message in (
        ((same, other), r"has checksum .*, and 000000000000 for the first process"),
        ((faster, None), r"rank 0 of 1: .*optimizer.learning_rate=0.01 \(was 0.5\); give all"),
    ):
        first = ([], *changed)
        monkeypatch.setattr(
            "lightning_fabric.Fabric.broadcast",
            lambda self, own, first=first: first if isinstance(own, tuple) else own,
        )
        with pytest.raises(RankError, match=message):
            train(same)


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


@pytest.mark.parametrize(
    "place",
    [
        "dape.train.task.LanguageModelling.build",  # weights on the device
        "dape.train.task.LanguageModelling.batch",  # windows on the host
        "dape.train.task.LanguageModelling.loss",  # the forward pass
        "torch.optim.AdamW.step",  # the moments
        "dape.train.loop.validate",
        "dape.train.checkpoint.save",
        "dape.train.task.LanguageModelling.save",
    ],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_memory_may_run_out_anywhere_in_a_training(place, error, data, tmp_path, monkeypatch):
    """The run ends with a line, unlocked, and goes on where there is room."""

    def fail(*_, **__):
        raise error

    settings = recipe(data, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        with pytest.raises(RankError, match=r"^out of memory: lower hardware\.micro_batch_size"):
            train(settings)
    assert train(settings).finished


def test_where_a_graph_finds_no_memory_the_run_ends(monkeypatch):
    """Without the graph it would need as much."""
    errors = {
        torch.OutOfMemoryError("CUDA out of memory."): torch.OutOfMemoryError,
        KeyboardInterrupt("stopped by SIGTERM"): KeyboardInterrupt,
        RuntimeError("operation not permitted when stream is capturing"): graphs.Unrecordable,
    }
    monkeypatch.setattr(graphs, "_flat_gradients", lambda loss: torch.zeros(1))
    for error, expected in errors.items():

        def record(self, error=error):
            try:
                raise error
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

        monkeypatch.setattr(graphs.Recording, "_warm_up", record)
        with pytest.raises((RuntimeError, KeyboardInterrupt)) as found:
            graphs.Recording(SimpleNamespace(device="cpu"), torch.nn.Linear(1, 1), (), 1)
        kinds = {type(each) for each in behind(found.value)}
        assert expected in kinds and (expected is graphs.Unrecordable) == (
            type(found.value) is graphs.Unrecordable
        )


def test_a_host_without_room_for_a_batch_is_known_before_the_first(data, tmp_path, monkeypatch):
    """80 GiB of a GPU, a terabyte of the host: 10^8 windows of 17 tokens would take 25 GiB."""
    gpu = torch.device("cuda")
    room = {"cpu": 2**40, "cuda": 80 * 2**30}
    monkeypatch.setattr(estimate, "memory_of", lambda device: room[device.type])
    monkeypatch.setattr(parallelize, "device", lambda hardware: gpu)
    for hardware, name in (({}, "hardware.micro_batch_size takes 95 GiB"),
                           ({"micro_batch_size": 1}, None)):  # fmt: skip
        settings = recipe(
            data, tmp_path, model={"hidden_size": 64}, training={"batch_size": 5 * 10**7},
            hardware=hardware,
        )  # fmt: skip
        if name:
            with pytest.raises(UserError, match=name):
                check_memory(settings)
        else:
            check_memory(settings)
    matrices = 4 * 2**16 * (4 * 2**16 * 2 + 2**20)  # bytes of float32, in two layers and a head
    large = {"hidden_size": 2**16, "vocab_size": 2**20}
    with pytest.raises(UserError, match=f"model takes {matrices // 2**30} GiB at least, and cuda"):
        check_memory(recipe(data, tmp_path, model=large))
    room["cpu"] = 12 * 2**30
    with pytest.raises(UserError, match=r"training.batch_size takes 13 GiB at least, and cpu has"):
        check_memory(settings)


def test_a_limit_of_the_control_group_is_the_memory(tmp_path, monkeypatch):
    """Linux would kill the process at the limit, without a word."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for folder, limit in {"": "max", "a": str(3 * 2**30), "a/b": str(5 * 2**30)}.items():
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(Path, "read_text", with_groups(Path.read_text, "7:pids:/x\n0::/a/b\n"))
    monkeypatch.setattr(estimate, "_GROUPS", {"": (str(tmp_path), "memory.max")})
    assert list(estimate._group_limits()) == [5 * 2**30, 3 * 2**30]
    assert estimate.memory_of(torch.device("cpu")) <= 3 * 2**30


@pytest.mark.parametrize("groups", ["0::/\n", ""])
def test_without_a_limit_the_memory_is_that_of_the_machine(groups, tmp_path, monkeypatch):
    """A Linux without containers has no file with a limit, and macOS has no control groups."""
    monkeypatch.setattr(Path, "read_text", with_groups(Path.read_text, groups))
    monkeypatch.setattr(estimate, "_GROUPS", {"": (str(tmp_path), "memory.max")})
    sizes = {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 2**12}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert estimate.memory_of(torch.device("cpu")) == 2**32


def with_groups(read, groups):
    return lambda path: groups if str(path) == "/proc/self/cgroup" else read(path)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "two"}, "RANK='two', no whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='', no whole number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1', no whole number"),
        ({"LOCAL_WORLD_SIZE": "1.5"}, "LOCAL_WORLD_SIZE='1.5', no whole number"),
        ({"RANK": "1"}, "RANK=1 and WORLD_SIZE=1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without LOCAL_RANK, MASTER_ADDR, MASTER_PORT, RANK"),
    ],
)
def test_variables_that_no_launcher_sets_are_named(
    data, tmp_path, monkeypatch, capsys, variables, message
):
    """The process would wait for others, or train without a lock."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "r.yaml").write_text(write(recipe(data, tmp_path / "run")))
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"dape: error: the environment has {message}; start several processes")
    assert not (tmp_path / "run").exists()
