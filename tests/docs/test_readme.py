import torch
from pages import execute


def test_its_python_runs_and_gives_the_shapes_it_says():
    names = execute("README.md")
    assert names["out"].shape == names["query"].shape == (1, 12, 256, 64)
    assert names["tokens"].shape == (1, 16) and names["tokens"].dtype == torch.long
