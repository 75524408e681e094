"""Triton's interpreter with shorter operators against the interpreter as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import interpreted


@pytest.mark.unhooked
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_shorter_operators_make_the_same_bits():
    program = [sys.executable, "-W", "ignore", Path(interpreted.__file__), "3"]
    true = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    floats, integers = interpreted.numbers(3)
    assert [list(floats), list(integers)] == json.loads(true)
    assert len(set(floats)) > 150 and len(set(integers)) > 60
