"""The fifteen tasks by name, and scores without reading the input."""

from collections.abc import Iterable

import torch

from dape.chomsky.context_free import (
    ModularArithmetic,
    ReverseString,
    SolveEquation,
    StackManipulation,
)
from dape.chomsky.context_sensitive import (
    BinaryAddition,
    BinaryMultiplication,
    BucketSort,
    ComputeSqrt,
    DuplicateString,
    MissingDuplicate,
    OddsFirst,
)
from dape.chomsky.regular import (
    CycleNavigation,
    EvenPairs,
    ModularArithmeticSimple,
    ParityCheck,
)
from dape.chomsky.task import Task, single
from dape.errors import unknown

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        EvenPairs(),
        ModularArithmeticSimple(),
        ParityCheck(),
        CycleNavigation(),
        StackManipulation(),
        ReverseString(),
        ModularArithmetic(),
        SolveEquation(),
        DuplicateString(),
        MissingDuplicate(),
        OddsFirst(),
        BinaryAddition(),
        BinaryMultiplication(),
        ComputeSqrt(),
        BucketSort(),
    )
}


def resolve(name: str) -> Task:
    """Return the task of a name.

    Raises:
        UserError: for an unknown name, with the nearest known name.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def baselines(task: Task, lengths: Iterable[int], samples: int, seed: int) -> tuple[float, float]:
    """Return the percent right of a constant answer, and of an answer without reading the input.

    The constant answer is the most frequent symbol of all scored positions. The second answer is
    the most frequent symbol by position and length, learned on equally many different samples. Both
    percentages are means over lengths.
    """
    symbols = torch.arange(len(task.outputs))
    counts, blind = [], []
    for length in lengths:
        one_hot = []
        for half in range(2):
            sample = task.sample(single(seed + half, samples), length)
            hits = (sample.outputs[..., None] == symbols) & sample.scored[..., None]
            one_hot.append(hits.sum(0))
        seen, tested = one_hot
        right = tested.gather(1, seen.argmax(1, keepdim=True)).sum()
        counts.append(tested.sum(0) / tested.sum())
        blind.append(float(right / tested.sum()))
    return 100 * float(torch.stack(counts).mean(0).max()), 100 * sum(blind) / len(blind)
