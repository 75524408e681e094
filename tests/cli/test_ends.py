"""What every command says where memory runs out, a signal ends it, or its output cannot be written.

The model stands for all that computes: its forward pass raises what a device would.
"""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
import yaml

from dape import cli
from dape.chomsky.encoder import Encoder
from dape.chomsky.stack import Stack
from dape.errors import RankError
from dape.model.modeling import DapeForCausalLM
from folders import dape, make_run, prepare, refused

ROOT = Path(__file__).parents[2]
SMALL = "--training.length 16 --training.batch-size 2 --training.steps 2 --training.precision fp32"
TRAIN = f"train r.yaml --data data --out new {SMALL} --hardware.device cpu"
COMMANDS = {
    "train": TRAIN,
    "retrofit": f"retrofit base/model --data data --out new {SMALL} --hardware.device cpu"
    " --lengths 16,32",
    "eval": "eval run --lengths 16,32 --out new",
    "eval context": "eval context run --lengths 16,32 --out new",
    "eval retrieval": "eval retrieval run --tasks passkey --lengths 512 --trials 1 --out new",
    "plot learned": "plot learned run --length 16 --out new/a.json",
    "explore": "explore run --length 16 --out new/a.html",
    "chomsky train": "chomsky train c.yaml --device cpu --out new",
}
MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ENCODERS = {
    "tasks": ["parity-check"],
    "schemes": ["kerple"],
    "seeds": [0],
    "model": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "training": {"steps": 2, "batch_size": 2, "length": 3, "precision": "fp32"},
    "evaluation": {"longest": 4, "samples": 1},
}
ERRORS = {
    "PyTorch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "the host": MemoryError(),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    prepare(folder, sizes=[600, 700])
    make_run(folder / "run", folder / "data", "dape-kerple")
    make_run(folder / "base", folder / "data", "rope")
    (folder / "r.yaml").write_text(yaml.safe_dump({"model": MODEL | {"scheme": "kerple"}}))
    (folder / "c.yaml").write_text(yaml.safe_dump(ENCODERS))
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def each_forward(patch, act):
    """Let every pass of a model act instead."""
    for cls, name in ((DapeForCausalLM, "forward"), (Encoder, "forward"), (Stack, "step")):
        patch.setattr(cls, name, act)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", COMMANDS)
def test_memory_that_runs_out_is_a_line_of_every_command(name, error, place, capsys, monkeypatch):
    def fail(*_, **__):
        raise ERRORS[error]

    each_forward(monkeypatch, fail)
    assert dape(*COMMANDS[name].split()) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("dape: error: out of memory")


def test_a_process_of_several_ends_at_a_sigterm_while_it_waits_for_another(
    place, capsys, monkeypatch
):
    """`torchrun` would end the process half a minute later, and without a line."""
    ended = threading.Event()
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)

    def wait(device):
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(60)
        raise RankError("the process has ended")

    monkeypatch.setattr("dape.attention.context_parallel.over_all_processes", wait)
    monkeypatch.setattr(os, "_exit", lambda status: ended.set() if status == 143 else None)
    dape(*COMMANDS["eval"].split())
    line = capsys.readouterr().err.splitlines()[0]
    reason = "rank 1 of 2: stopped by SIGTERM, as after the end of another process"
    assert line == f"dape: error: {reason}; {cli.CONTINUED}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_ends_every_command_with_a_line_and_the_next_time_it_goes_on(
    name, number, place, capsys, monkeypatch
):
    def end(*_, **__):
        os.kill(os.getpid(), number)

    # A process that a shell started in the background ignores the signal of the keyboard.
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(15)
    with monkeypatch.context() as patch:
        each_forward(patch, end)
        status = dape(*COMMANDS[name].split())
    signal.signal(signal.SIGINT, before[0])
    assert signal.getsignal(signal.SIGTERM) == before[1]
    *_, line = capsys.readouterr().err.splitlines()
    # The benchmark collects signals itself, to save a checkpoint first.
    terminated = number == signal.SIGTERM and name != "chomsky train"
    reason = "stopped by SIGTERM" if terminated else "interrupted"
    assert line == f"dape: {reason}; {cli.CONTINUED}"
    assert status == (143 if terminated else 130)
    assert dape(*COMMANDS[name].split()) == 0


def test_an_export_without_memory_is_a_line_and_leaves_nothing(place, capsys, monkeypatch):
    def fail(*_, **__):
        raise ERRORS["the host"]

    monkeypatch.setattr(DapeForCausalLM, "save_pretrained", fail)
    assert "out of memory" in refused(capsys, "export", "run", "--out", "new")
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    "words",
    [
        "plot nowhere --out file/a.html",
        "plot retrieval nowhere --out file/a.md",
        "plot context nowhere --out file/a.png",
        "plot encoding kerple --out file/a.png",
        "plot learned nowhere --out a.md file/a.json",
        "explore nowhere --out file/a.html",
        "chomsky map nowhere --task parity-check --scheme kerple --out file/a.md",
        "chomsky train c.yaml --out file",
        "bench attention --device cpu --out file",
        "bench model --device cpu --out file",
        "export nowhere --out file/a",
        "prepare text --out file/a",
        f"{TRAIN} --out file/a",
        COMMANDS["retrofit"].replace("new", "file/a"),
        "eval run --lengths 16 --out file",
        "eval context run --lengths 16,32 --out file",
        "eval retrieval run --tasks passkey --out file",
        "paper demo --scale smoke",
        "paper report --scale smoke",
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    words, place, capsys, monkeypatch
):
    (place / "file").touch()
    (place / "runs").touch()  # of `paper`
    (place / "recipes").symlink_to(ROOT / "recipes")

    def worked(*_, **__):
        pytest.fail("the work began")

    each_forward(monkeypatch, worked)
    line = refused(capsys, *words.split())
    assert "file" in line or "runs" in line
    assert "cannot be written" in line or "Not a directory" in line or "exists and is" in line
