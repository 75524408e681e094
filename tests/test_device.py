"""Devices by name."""

from types import SimpleNamespace

import pytest
import torch

from dape.device import choose_device


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_has_an_index(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = SimpleNamespace(device=torch.device("cuda:0"))  # as PyTorch makes it of `cuda`
    monkeypatch.setattr(torch, "empty", lambda *size, device: made if device == "cuda" else None)
    assert choose_device(name).index == 0


@pytest.mark.gpu
def test_on_a_gpu_auto_can_be_set():
    torch.cuda.set_device(choose_device("auto"))
    assert choose_device("auto") == torch.empty(0, device="cuda").device
