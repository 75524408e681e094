"""What importing `dape` costs, counted in modules, and that its names are what they say."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dape

HEAVY = {"torch", "transformers", "lightning", "matplotlib", "datasets", "tensorboard"}


def imported(statements):
    """Return which of the heavy libraries a fresh Python has imported after some statements."""
    code = f"import sys; {statements}; print(*({HEAVY!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_dape_imports_no_library():
    assert imported("import dape") == set()


def test_attention_and_its_parts_import_torch_alone():
    assert imported("import dape; dape.attention, dape.Kerple, dape.DAPE") == {"torch"}


def test_attention_needs_no_triton():
    """A build of PyTorch for CPUs comes without."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, dape;"
        "bias, adapter, x = dape.Kerple(4), dape.DAPE(4), torch.randn(1, 4, 40, 16);"
        "whole = dape.attention(x, x, x, bias, adapter);"
        "last = dape.attention(x[:, :, -1:], x, x, bias, adapter, query_offset=39);"
        "print((whole[:, :, -1:] - last).abs().max().item() < 1e-5)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["True"], run.stderr


def test_the_operator_keeps_its_name_after_its_subpackage_is_imported():
    assert import_module("dape.attention").attention is dape.attention
    assert dape.attention is import_module("dape.attention.operator").attention


def test_every_part_of_attention_can_be_imported_under_another_name():
    import dape.attention.chunked as chunked
    import dape.attention.fused.tables as tables
    import dape.attention.operator as operator

    for module in (chunked, tables, operator):
        assert module is sys.modules[module.__name__]
    folder = Path(operator.__file__).parent
    names = [path.stem for path in folder.iterdir() if path.stem.strip("_") == path.stem]
    assert all(
        getattr(dape.attention, name) is sys.modules[f"dape.attention.{name}"] for name in names
    )


@pytest.mark.parametrize("name", dape.__all__)
def test_every_public_name_is_what_it_says(name):
    assert getattr(dape, name).__name__ == name
    assert name in dir(dape)


def test_a_name_there_is_not_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'kerple'"):
        dape.kerple  # noqa: B018


def test_packages_of_functions_are_attributes_and_cost_nothing_until_one_is_used():
    assert imported("import dape; dape.evaluate, dape.train; 'train' in dir(dape)") == set()
    assert imported("import dape; dape.evaluate.evaluate") >= {"torch"}
    for package in (dape.evaluate, dape.train):
        for name in package.__all__:
            assert getattr(package, name).__name__ == name
