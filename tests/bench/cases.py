"""Small cases of a benchmark, and methods that are wrong."""

import torch

from dape.bench.case import Case
from dape.bench.methods import Method, ours


def case(**changes):
    sizes = {"scheme": "dape-kerple", "heads": 3, "head_dim": 4, "length": 9, "batch": 2}
    rest = {"dtype": "fp32", "device": torch.device("cpu"), "seed": 0}
    return Case(**sizes | rest | changes)


def method(attend=None, prepare=None, name="made"):
    """A method that computes `attend(textbook, query, key, value)`, or is prepared otherwise."""

    def around(case, parts):
        right = ours("reference", case, parts)
        return lambda *qkv: attend(right, *qkv)

    return Method(name, "for a test", prepare or around)
