"""The processes of a command: which ones there are, and what they must have in common."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dape import cli
from dape.attention.context_parallel import ContextParallel, over_all_processes
from dape.errors import RankError, UserError
from dape.ranks import check_same

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "WORLD_SIZE='', no whole number"),
        ("two", "WORLD_SIZE='two', no whole number"),
        ("2", "WORLD_SIZE=2 without LOCAL_RANK, MASTER_ADDR, MASTER_PORT, RANK"),
    ],
)
def test_an_evaluation_names_variables_that_no_launcher_sets(monkeypatch, capsys, value, message):
    monkeypatch.setenv("WORLD_SIZE", value)
    assert cli.main(["eval", "runs/none", "--device", "cpu"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"dape: error: the environment has {message}; start several processes")


def test_an_evaluation_by_more_processes_than_gpus_is_refused(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "1" if name.endswith("RANK") else "4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes for 2 GPUs; start 2 with `torchrun"):
        over_all_processes(torch.device("cuda"))


def test_an_evaluation_by_a_process_for_each_gpu_has_all_gpus(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "1" if name.endswith("RANK") else "2")
    group, done = SimpleNamespace(group_name="all", rank=lambda: 1, size=lambda: 2), []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", done.append)
    monkeypatch.setattr(dist, "init_process_group", done.append)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=group))
    device = torch.device("cuda:1")
    assert over_all_processes(torch.device("cuda")) == (ContextParallel("all", 1, 2), device)
    assert done == [device, "nccl"]
    assert over_all_processes(torch.device("cpu"))[1] == torch.device("cpu")
    assert done[2:] == ["gloo"]


def test_an_evaluation_by_several_processes_on_one_gpu_is_refused(monkeypatch, capsys):
    """Each process took the GPU of its own number, whatever the index."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "0" if name.endswith("RANK") else "2")
    assert cli.main(["eval", "runs/none", "--device", "cuda:1"]) == 2
    assert capsys.readouterr().err.startswith(
        "dape: error: --device cuda:1: 2 processes take a GPU each; take --device cuda, and"
    )


@pytest.mark.parametrize("name", sorted(cli.COMMANDS.keys() - set(cli.TOGETHER)))
def test_a_command_of_a_single_process_is_refused_by_all(monkeypatch, capsys, name):
    """All processes would do the whole work, and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, shown in ("0", f"`dape {name}` is the work of a single process"), ("1", ""):
        monkeypatch.setenv("RANK", rank)
        assert cli.main([*name.split(), "nowhere"]) == 2
        assert shown in (found := capsys.readouterr().err) and bool(found) == bool(shown)


def test_the_end_of_another_process_is_a_line(monkeypatch, capsys):
    error = RuntimeError("pair.cc:553] Connection closed by peer [127.0.0.1]:19369")

    def fail(words):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(RuntimeError, match="closed by peer"):
        cli.main(["eval"])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["eval"]) == 2
    assert "dape: error: rank 1 of 2: another process has ended;" in capsys.readouterr().err


def test_a_corpus_unlike_that_of_the_first_process_is_refused(monkeypatch):
    check_same("data", "a" * 64, "a" * 64)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RankError, match=r"rank 1 of 2: data has checksum b{12}, and a{12} for the"):
        check_same("data", "b" * 64, "a" * 64)
