"""The interface of a task: batches of examples drawn on any device, and a solver for checks.

A task is a function of a string. Tasks and levels are from Deletang et al. (2023, section 4 and
appendix A). Where text and released code of the paper differ, the tasks follow the code.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dape.errors import UserError

Strings = Int[Tensor, "batch length"]
SEEDS = 2**30  # seeds of models and lengths of tests are below this number


class Sample(NamedTuple):
    """Examples of equal length: ids of the input, ids of the output, and the scored positions."""

    inputs: Int[Tensor, "batch length"]
    outputs: Int[Tensor, "batch out"]
    scored: Bool[Tensor, "batch out"]


class Draw:
    """Random integers for a batch in equal parts, with a generator per part.

    Models trained together get the examples of separate trainings.

    Args:
        generators: a generator per part, on the device of the batch.
        rows: examples in a part.
    """

    def __init__(self, generators: Sequence[torch.Generator], rows: int) -> None:
        self._generators, self._rows = generators, rows
        self.device = generators[0].device
        self.batch = rows * len(generators)

    def integers(self, count: int, *shape: int) -> Int[Tensor, "batch ..."]:
        """Return uniform integers from 0 to count - 1, of shape `[batch, *shape]`."""
        size = (self._rows, *shape)
        return torch.cat(
            [torch.randint(count, size, generator=g, device=self.device) for g in self._generators]
        )

    def below(self, counts: Int[Tensor, "batch ..."]) -> Int[Tensor, "batch ..."]:
        """Return uniform integers from 0 to count - 1, for every count in `counts`, up to 2^31.

        The integer is the remainder of 63 random bits, and probabilities are exact to a factor of
        1 + 2^-32.
        """
        return self.integers(2**63 - 1, *counts.shape[1:]) % counts


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a random generator of a seed below 2^34; the low 32 bits are below `SEEDS`.

    PyTorch's generator on a CPU reads the low 32 bits of a seed alone. There the two high bits of
    the seed take the places of the free high bits among the 32.
    """
    made = torch.Generator(device)
    folded = seed % 2**32 + (seed >> 32) * SEEDS
    return made.manual_seed(folded if made.device.type == "cpu" else seed)


def single(seed: int, batch: int, device: torch.device | str = "cpu") -> Draw:
    """Return the source of a whole batch from a seed."""
    return Draw([generator(seed, device)], batch)


class Task:
    """A function from strings to strings, for any length of the input.

    A docstring shows examples as `input -> output`, in the symbols of `inputs` and `outputs`.

    Attributes:
        name: name on the command line.
        level: `regular`, `context-free` or `context-sensitive`.
        inputs: the symbols by input id.
        outputs: the symbols by output id.
        chance: percent of scored symbols right, for the best constant answer.
        blind: percent right for the most frequent symbol by output position and length. `chance`
            and `blind` are means over the lengths 41 to 500.
        permutable: whether the order of the input does not matter.

    """

    name: ClassVar[str]
    level: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]
    chance: ClassVar[float] = 50.0
    blind: ClassVar[float] = 50.0
    permutable: ClassVar[bool] = False

    def input_length(self, length: int) -> int:
        """Return the number of symbols of an input of the requested length."""
        return length

    def output_length(self, length: int) -> int:
        """Return the number of symbols of the output."""
        return 1

    def tokens(self, length: int) -> int:
        """Return the number of symbols of input and output."""
        return self.input_length(length) + self.output_length(length)

    def sample(self, draw: Draw, length: int) -> Sample:
        """Return a batch of examples of the requested length.

        Raises:
            UserError: for a length below 1.
        """
        if length < 1:
            raise UserError(f"length={length} must be at least 1")
        inputs, outputs, *ends = self._sample(draw, self.input_length(length))
        positions = torch.arange(outputs.shape[1], device=outputs.device).expand_as(outputs)
        scored = positions <= ends[0] if ends else torch.ones_like(outputs, dtype=torch.bool)
        return Sample(inputs, outputs, scored)

    def _sample(self, draw: Draw, length: int) -> tuple[Tensor, ...]:
        """Return inputs, outputs and, if not all count, the index of the last scored position."""
        raise NotImplementedError

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Return the scored output of an input, in plain Python, to test the sampler."""
        raise NotImplementedError


class BitTask(Task):
    """A task on strings of fair bits."""

    inputs = ("0", "1")
    outputs = ("0", "1")

    def _sample(self, draw: Draw, length: int) -> tuple[Tensor, ...]:
        bits = draw.integers(2, length)
        return bits, self.answer(bits)

    def answer(self, bits: Strings) -> Int[Tensor, "batch out"]:
        """Return the outputs."""
        raise NotImplementedError
