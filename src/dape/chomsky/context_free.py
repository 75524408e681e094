"""The four deterministic context-free tasks, solvable with a stack."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from dape.chomsky.brackets import expressions, symbols
from dape.chomsky.regular import MODULUS, evaluate
from dape.chomsky.task import BitTask, Draw, Strings, Task


class StackManipulation(Task):
    """Stack Manipulation: the final stack, top first, after a program of pushes and pops.

    The input is an initial stack of s bits, bottom first, and n - s uniform actions; s is uniform
    on 1 .. n - 1. A pop of an empty stack does nothing. The stack and the `end` after the stack
    count.

        1 0 push-0 push-0 pop -> 0 0 1 end
        1 0 pop push-0 pop pop push-0 pop -> end
    """

    name = "stack-manipulation"
    level = "context-free"
    inputs = ("0", "1", "pop", "push-0", "push-1")
    outputs = ("0", "1", "end")
    chance = blind = 49.6

    def output_length(self, length: int) -> int:
        """Return the length of a full stack and the end."""
        return length + 1

    def _sample(self, draw: Draw, length: int) -> tuple[Tensor, ...]:
        initial = 1 + draw.integers(max(length - 1, 1), 1)
        index = torch.arange(length, device=draw.device)
        bits, actions = draw.integers(2, length), 2 + draw.integers(3, length)
        inputs = torch.where(index < initial, bits, actions)
        pushes = inputs != 2
        steps = torch.where(pushes, 1, -1).cumsum(1)
        # A walk that stays at 0 instead of going below equals the free walk less its lowest point
        # so far.
        height = steps - steps.cummin(1).values.clamp(max=0)
        # The final symbol at a height is the last symbol pushed there.
        last = torch.zeros(draw.batch, length + 1, dtype=torch.long, device=draw.device)
        last = last.scatter_reduce(1, height, torch.where(pushes, index + 1, 0), "amax")
        bottom_first = inputs.gather(1, (last - 1).clamp(min=0)) % 3  # push-0 is 3, push-1 is 4
        size = height[:, -1:]
        place = torch.arange(length + 1, device=draw.device)
        top_first = bottom_first.gather(1, (size - place).clamp(min=0))
        stack = torch.where(place < size, top_first, torch.where(place == size, 2, 0))
        return inputs, stack, size

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Run the program."""
        stack: list[int] = []
        for action in inputs:
            if action != 2:
                stack.append(action % 3)
            elif stack:
                stack.pop()
        return [*reversed(stack), 2]


class ReverseString(BitTask):
    """Reverse String: the input, last symbol first.

    0 0 0 1 0 -> 0 1 0 0 0
    0 0 0 1 1 1 0 1 -> 1 0 1 1 1 0 0 0
    """

    name = "reverse-string"
    level = "context-free"

    def output_length(self, length: int) -> int:
        """Return the length of the input."""
        return length

    def answer(self, bits: Strings) -> Int[Tensor, "batch out"]:
        """Return the bits reversed."""
        return bits.flip(1)

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Reverse the list."""
        return list(reversed(inputs))


class ModularArithmetic(Task):
    """Modular Arithmetic: the value of a bracketed expression over +, - and x, modulo 5.

    Every binary operation has brackets. A constant answer of 0 is right for 31 percent.

        ( 2 - ( - 4 ) ) -> 1
        ( ( 2 x 3 ) x ( 4 ) ) -> 4
    """

    name = "modular-arithmetic"
    level = "context-free"
    inputs: ClassVar[tuple[str, ...]] = symbols(operators=3)
    outputs = tuple("01234")
    chance = blind = 31.1

    def _sample(self, draw: Draw, length: int) -> tuple[Tensor, ...]:
        return expressions(draw, length, operators=3)

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Let Python compute the expression."""
        return [evaluate(self.inputs[each] for each in inputs)]


class SolveEquation(Task):
    """Solve Equation: the digit hidden by `?` in a bracketed expression over + and -.

    A uniform index of the expression is drawn, and the first digit from the index on, around the
    end, is hidden. Inputs of one or two symbols are too short for an equation. Their symbols are
    zeros, and the answer is 0.

        ( ? ) = 3 -> 3
        ( 1 + - ? ) = 4 -> 2
    """

    name = "solve-equation"
    level = "context-free"
    inputs: ClassVar[tuple[str, ...]] = (*symbols(operators=2), "?", "=")
    outputs = tuple("01234")
    chance = blind = 20.0

    def _sample(self, draw: Draw, length: int) -> tuple[Tensor, ...]:
        if length < 3:
            nothing = torch.zeros(draw.batch, length, dtype=torch.long, device=draw.device)
            return nothing, nothing[:, :1]
        unknown, equals = self.inputs.index("?"), self.inputs.index("=")
        expression, value = expressions(draw, length - 2, operators=2)
        onwards = torch.arange(length - 2, device=draw.device) - draw.integers(length - 2, 1)
        distance = torch.where(expression < MODULUS, onwards % (length - 2), length)
        hidden = distance.argmin(1, keepdim=True)
        equation = pad(expression.scatter(1, hidden, unknown), (0, 1), value=equals)
        return torch.cat((equation, value), 1), expression.gather(1, hidden)

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Try every digit."""
        if len(inputs) < 3:
            return [0]
        text = [self.inputs[each] for each in inputs[:-2]]
        return [
            digit
            for digit in range(MODULUS)
            if evaluate(str(digit) if each == "?" else each for each in text) == inputs[-1]
        ]
