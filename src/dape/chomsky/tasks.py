"""The fifteen tasks by name."""

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
from dape.chomsky.task import Task
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
