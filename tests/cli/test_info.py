"""`dape info`: what it says of the installation, and of every scheme."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from dape.attention import select
from dape.cli import main
from dape.positions.scheme import ADAPTERS, BASES


def run(capsys, *arguments):
    """Return the lines that `dape info` prints."""
    assert main(["info", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def row(lines, name):
    """Return the cells of the one row that a name begins."""
    (found,) = (line for line in lines if line.split(" ")[0] == name)
    return re.split(r" {2,}", found.strip())


def test_versions_backends_and_schemes_are_listed(capsys):
    lines = run(capsys)
    assert row(lines, "torch") == ["torch", version("torch")]
    assert any(line.startswith("backend chunked  ") and "works here" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    assert ", ".join(BASES) in text and ", ".join(f"{name}-" for name in ADAPTERS) in text


@pytest.mark.parametrize(
    ("gpu", "fused", "auto"),
    [
        (False, "not here: no CUDA GPU (", "sdpa, chunked"),
        (True, "works here (", "sdpa, cuda, triton, chunked"),
    ],
)
def test_it_says_why_fused_kernels_do_not_work_and_what_auto_takes(
    capsys, monkeypatch, gpu, fused, auto
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(select, "has_triton", lambda: True)
    lines = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in run(capsys)}
    assert lines["backend triton"].startswith(fused) and lines["backend cuda"].startswith(fused)
    # chunked serves every call, so the backends after it are never taken
    assert lines["backend auto"].startswith(
        f"takes the first backend that serves a call, of {auto}, "
    )


def test_what_the_fused_kernels_do_not_serve_is_named(capsys):
    _, _, text = " ".join(" ".join(run(capsys)).split()).partition(" fused triton and cuda ")
    names, _, rest = text.removeprefix("serve all schemes and adapters except ").partition(". ")
    assert rest == "The exceptions, and DAPE V2 with FIRE, run in chunked."
    assert {"cope", "transformer-xl"} <= set(names.split(", "))
    served = {"alibi", "kerple", "t5", "sandwich", "fire", "rope", "dape-", "talking-heads-"}
    assert served.isdisjoint(names.split(", "))


def test_every_base_and_every_adapter_has_one_row(capsys):
    lines = run(capsys, "schemes")
    for base in BASES.values():
        cells = row(lines, base.name)
        assert f"{base.paper} {base.year}" in cells and cells[-1] == base.extrapolates
    for adapter in ADAPTERS.values():
        cells = row(lines, f"{adapter.name}-")
        assert f"{adapter.paper} {adapter.year}" in cells and cells[-1] == adapter.extrapolates


@pytest.mark.parametrize(
    ("name", "part", "costs"),
    [
        ("rope", "rotation RoPE", ["0"]),
        ("partial-rope", "rotation RoPE(fraction=0.25)", ["0"]),
        ("learned", "embedding Learned", ["393,216 in all"]),  # 512 rows of 768
        ("kerple", "bias Kerple", ["24"]),  # p and a of 12 heads
        ("t5", "bias T5", ["384"]),  # 32 buckets of 12 heads
        # Of 12 layers: the 14,352 and 42,000 of the paper.
        ("dape-", "adapter DAPE", ["1,196", "812"]),
        ("dape3-", "adapter DAPE(kernel_size=3)", ["3,500", "2,348"]),
    ],
)
def test_parts_and_parameters_are_those_of_the_125m_model(capsys, name, part, costs):
    cells = row(run(capsys, "schemes"), name)
    assert cells[1] == part and cells[3:-1] == costs


def test_an_unknown_option_is_refused_in_one_line(capsys):
    assert main(["info", "--scheme"]) == 2
    assert "unknown option '--scheme'" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error():
    command = f"{sys.executable} -m dape train --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: dape train") and done.stderr == ""
