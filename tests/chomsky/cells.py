"""A benchmark of a size for a test."""

from dataclasses import replace

from dape.chomsky.benchmark import Benchmark
from dape.chomsky.cell import Cell
from dape.chomsky.encoder import Model
from dape.chomsky.measure import Evaluation
from dape.chomsky.stack import Training
from evaluations import PROVENANCE

SMALL = Benchmark(
    tasks=("even-pairs", "binary-addition"),
    schemes=("kerple", "randomized-rope"),
    seeds=(0, 1),
    model=Model(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, adapter_hidden=4),
    training=Training(steps=6, batch_size=4, length=4),
    evaluation=Evaluation(longest=9, samples=4, batch_tokens=32),
)


def small(folder, **changes):
    return replace(SMALL, out=str(folder), **changes)


def cell(task, scheme, seed, accuracy, trained=2):
    """A cell of given accuracies, the first of them within the lengths of training."""
    settings = SMALL.settings()
    settings["training"] = {**settings["training"], "length": trained}
    return Cell(
        task=task,
        scheme=scheme,
        seed=seed,
        settings=settings,
        parameters=10,
        loss=[(3, 0.7), (6, 0.25)],
        accuracy=accuracy,
        seconds={"training": 6.0, "evaluation": 3.0},
        models=2,
        provenance=PROVENANCE | {"device": "a GPU", "versions": {"torch": "2"}},
    )
