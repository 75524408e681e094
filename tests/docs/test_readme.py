import re
from pathlib import Path

import torch

TEXT = (Path(__file__).parents[2] / "README.md").read_text()


def test_its_python_runs_and_gives_the_shapes_it_says():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["out"].shape == names["query"].shape == (1, 12, 256, 64)
    assert names["tokens"].shape == (1, 16) and names["tokens"].dtype == torch.long
