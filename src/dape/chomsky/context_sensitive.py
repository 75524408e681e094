"""The seven context-sensitive tasks, solvable with a tape."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from dape.chomsky import binary
from dape.chomsky.task import BitTask, Draw, Strings, Task

# Longer numbers never have 31 low bits of 0, a case of probability 2^-31.
NONZERO_BITS = 31


class DuplicateString(BitTask):
    """Duplicate String: the input twice.

    0 1 1 1 1 -> 0 1 1 1 1 0 1 1 1 1
    1 0 1 1 0 1 0 1 -> 1 0 1 1 0 1 0 1 1 0 1 1 0 1 0 1
    """

    name = "duplicate-string"
    level = "context-sensitive"

    def output_length(self, length: int) -> int:
        """Return twice the length."""
        return 2 * length

    def answer(self, bits: Strings) -> Int[Tensor, "batch out"]:
        """Return the bits twice."""
        return bits.repeat(1, 2)

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Repeat the list."""
        return 2 * list(inputs)


class MissingDuplicate(Task):
    """Missing Duplicate: the bit hidden by `?` in a string written twice.

    A uniform position is hidden. An odd length ends in `_`. The input of length 1 is 1, answered
    by 1.

        1 0 1 ? _ -> 0
        1 0 0 0 ? 0 0 0 -> 1
    """

    name = "missing-duplicate"
    level = "context-sensitive"
    inputs = ("0", "1", "?", "_")
    outputs = ("0", "1")

    def _sample(self, draw: Draw, length: int) -> tuple[Tensor, ...]:
        half = length // 2
        if half == 0:
            ones = torch.ones(draw.batch, 1, dtype=torch.long, device=draw.device)
            return ones, ones
        twice = draw.integers(2, half).repeat(1, 2)
        hidden = draw.integers(2 * half, 1)
        return pad(twice.scatter(1, hidden, 2), (0, length % 2), value=3), twice.gather(1, hidden)

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Return the bit of the second copy."""
        half = len(inputs) // 2
        return [inputs[(inputs.index(2) + half) % (2 * half)] if half else 1]


class OddsFirst(BitTask):
    """Odds First: the symbols x1 x3 x5 ..., then x0 x2 x4 ..., counted from 0.

    As in the authors' code; the paper's text begins with x0.

        1 1 0 0 0 -> 1 0 1 0 0
        0 1 0 0 0 0 0 0 -> 1 0 0 0 0 0 0 0
    """

    name = "odds-first"
    level = "context-sensitive"

    def output_length(self, length: int) -> int:
        """Return the length of the input."""
        return length

    def answer(self, bits: Strings) -> Int[Tensor, "batch out"]:
        """Return the bits of odd index, then of even index."""
        return torch.cat((bits[:, 1::2], bits[:, ::2]), 1)

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Sort by the parity of the index, with a stable sort."""
        order = sorted(range(len(inputs)), key=lambda index: index % 2 == 0)
        return [inputs[index] for index in order]


class _Binary(Task):
    """An operation on two binary numbers, least significant bit first, of lengths p + q = n - 1.

    p is uniform on 1 .. n - 2, and the numbers are uniform on 1 .. 2^length - 1. The bits of the
    result without leading zeros and the following `end` count.
    """

    level = "context-sensitive"
    sign: str

    def __init_subclass__(cls) -> None:
        cls.inputs, cls.outputs = ("0", "1", cls.sign), ("0", "1", "end")

    def _sample(self, draw: Draw, length: int) -> tuple[Tensor, ...]:
        if length < 3:
            inputs, result, size = self._degenerate(draw, length)
        else:
            index = torch.arange(length, device=draw.device)
            first = 1 + draw.integers(length - 2, 1)
            x = _natural(draw, length, first)
            y = _natural(draw, length, length - 1 - first)
            shifted = y.gather(1, (index - first - 1).clamp(min=0))
            inputs = torch.where(index < first, x, torch.where(index == first, 2, shifted))
            result = self.result(x, y)
            size = binary.width(result)
        outputs = pad(result, (0, self.output_length(length) - result.shape[1]))
        return inputs, outputs.scatter(1, size, 2), size

    def _degenerate(self, draw: Draw, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs too short for two numbers, their results, and the number of scored bits."""
        value = draw.integers(3, 1) if length == 2 else draw.integers(1, 1)
        inputs = value >> torch.arange(length, device=draw.device) & 1
        result, least = self.lone(inputs)
        return inputs, result, binary.width(result).clamp(min=least)

    def lone(self, bits: Strings) -> tuple[Strings, int]:
        """Return the result for a number alone, and the least number of scored bits."""
        raise NotImplementedError

    def result(self, x: Strings, y: Strings) -> Strings:
        """Return the bits of the result."""
        raise NotImplementedError

    def integer(self, x: int, y: int) -> int:
        """Return the result in Python's integers."""
        raise NotImplementedError

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Compute in Python's integers."""
        if 2 not in inputs:
            return self.solve_lone(list(inputs))
        first = inputs.index(2)
        x, y = (binary.number(list(part)) for part in (inputs[:first], inputs[first + 1 :]))
        return [*binary.digits(self.integer(x, y)), 2]

    def solve_lone(self, inputs: list[int]) -> list[int]:
        """Return the scored output for a number alone."""
        raise NotImplementedError


class BinaryAddition(_Binary):
    """Binary Addition: the sum of two numbers, least significant bit first.

    Inputs of one or two symbols are a single number, 0 or uniform on 0 .. 2, and the answer.

        0 1 0 + 1 -> 1 1 end
        1 1 0 1 + 0 0 1 -> 1 1 1 1 end
    """

    name = "binary-addition"
    sign = "+"

    def output_length(self, length: int) -> int:
        """Return the length of the sum and the end."""
        return length + 1

    def result(self, x: Strings, y: Strings) -> Strings:
        """Return the sum."""
        return binary.add(x, y)[:, :-1]

    def lone(self, bits: Strings) -> tuple[Strings, int]:
        """Return the number, where 0 has one bit."""
        return bits, 1

    def integer(self, x: int, y: int) -> int:
        """Return the sum."""
        return x + y

    def solve_lone(self, inputs: list[int]) -> list[int]:
        """Return the number."""
        return [*(binary.digits(binary.number(inputs)) or [0]), 2]


class BinaryMultiplication(_Binary):
    """Binary Multiplication: the product of two numbers, least significant bit first.

    Inputs of one or two symbols are a single number, 0 or uniform on 0 .. 2. The answers are empty
    and 0.

        1 1 x 1 0 -> 1 1 end
        1 1 0 0 1 1 x 1 -> 1 1 0 0 1 1 end
    """

    name = "binary-multiplication"
    sign = "x"

    def output_length(self, length: int) -> int:
        """Return the length of the product, of at most n - 1 bits, and the end."""
        return length

    def result(self, x: Strings, y: Strings) -> Strings:
        """Return the product."""
        return binary.multiply(x, y)

    def lone(self, bits: Strings) -> tuple[Strings, int]:
        """Return 0, of one bit for a number of two bits."""
        return torch.zeros_like(bits), bits.shape[1] - 1

    def integer(self, x: int, y: int) -> int:
        """Return the product."""
        return x * y

    def solve_lone(self, inputs: list[int]) -> list[int]:
        """Return 0."""
        return [2] if len(inputs) == 1 else [0, 2]


class ComputeSqrt(BitTask):
    """Compute Sqrt: the whole part of a square root, most significant bit first.

    The number is uniform on 1 .. 2^n - 1. The root has ceil(n / 2) bits, leading zeros included.

        1 1 1 0 1 -> 1 0 1
        1 0 1 1 1 0 1 0 -> 1 1 0 1
    """

    name = "compute-sqrt"
    level = "context-sensitive"

    def output_length(self, length: int) -> int:
        """Return half the length, rounded up."""
        return (length + 1) // 2

    def _sample(self, draw: Draw, length: int) -> tuple[Tensor, ...]:
        size = torch.full((draw.batch, 1), length, device=draw.device)
        bits = _natural(draw, length, size).flip(1)
        return bits, self.answer(bits)

    def answer(self, bits: Strings) -> Int[Tensor, "batch out"]:
        """Return the root."""
        return binary.square_root(bits.flip(1)).flip(1)

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Compute in Python's integers."""
        root = binary.digits(math.isqrt(binary.number(list(reversed(inputs)))))
        return [0] * (self.output_length(len(inputs)) - len(root)) + root[::-1]


class BucketSort(Task):
    """Bucket Sort: the symbols in ascending order.

    The most frequent symbol of each position, blind to the input, is right for 90 percent of the
    positions.

        4 2 4 4 3 -> 2 3 4 4 4
        2 0 3 0 4 4 3 0 -> 0 0 0 2 3 3 4 4
    """

    name = "bucket-sort"
    level = "context-sensitive"
    inputs = tuple("01234")
    outputs = tuple("01234")
    chance = 20.0
    blind = 90.1
    permutable = True

    def output_length(self, length: int) -> int:
        """Return the length of the input."""
        return length

    def _sample(self, draw: Draw, length: int) -> tuple[Tensor, ...]:
        inputs = draw.integers(5, length)
        return inputs, inputs.sort(1).values

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Sort the list."""
        return sorted(inputs)


def _natural(draw: Draw, width: int, size: Int[Tensor, "batch 1"]) -> Int[Tensor, "batch width"]:
    """Return numbers uniform on 1 .. 2^size - 1 in rows of `width` bits, lowest first."""
    index = torch.arange(width, device=draw.device)
    low = 1 + draw.below((1 << size.clamp(max=NONZERO_BITS)) - 1)
    high = draw.integers(2, width)
    bits = torch.where(index < NONZERO_BITS, low >> index.clamp(max=NONZERO_BITS) & 1, high)
    return torch.where(index < size, bits, 0)
