"""The four regular tasks, solvable by a finite automaton."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from dape.chomsky.task import BitTask, Draw, Strings, Task

MODULUS = 5


class EvenPairs(BitTask):
    """Even Pairs: the parity of the number of unequal adjacent pairs.

    Unequal pairs are changes of symbol. Therefore the answer is 1 if and only if the first symbol
    differs from the last.

        0 0 0 1 1 -> 1
        1 1 1 1 1 0 0 1 -> 0
    """

    name = "even-pairs"
    level = "regular"

    def answer(self, bits: Strings) -> Int[Tensor, "batch 1"]:
        """Return whether first and last differ."""
        return bits[:, :1] ^ bits[:, -1:]

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Count the pairs."""
        return [sum(a != b for a, b in pairwise(inputs)) % 2]


class ModularArithmeticSimple(Task):
    """Modular Arithmetic (Simple): the value of digits under +, - and x, modulo 5.

    Products bind tighter. Digits and operators are uniform. An even length is lowered by 1, where
    the paper's text raises even lengths.

        1 + 0 - 1 -> 0
        0 - 4 - 4 x 3 -> 4
    """

    name = "modular-arithmetic-simple"
    level = "regular"
    inputs = (*"01234", "+", "-", "x")
    outputs = tuple("01234")
    chance = blind = 20.0

    def input_length(self, length: int) -> int:
        """Return the length, less 1 if even."""
        return length - 1 + length % 2

    def _sample(self, draw: Draw, length: int) -> tuple[Tensor, ...]:
        terms = length // 2 + 1
        digits, operators = draw.integers(MODULUS, terms), draw.integers(3, terms - 1)
        inputs = torch.empty(draw.batch, length, dtype=torch.long, device=draw.device)
        inputs[:, ::2], inputs[:, 1::2] = digits, MODULUS + operators
        # A product of digits is a sum of logarithms to base 2 modulo 5, or 0 if a digit is 0.
        logarithms = (digits == 2) + 3 * (digits == 3) + 2 * (digits == 4)
        signs = (operators == 0).long() - (operators == 1).long()  # 0 continues a product
        signs = pad(signs, (1, 0), value=1)
        product = signs.abs().cumsum(1) - 1  # the product of a digit
        sign, exponent, zeros = (
            torch.zeros_like(digits).scatter_add(1, product, each)
            for each in (signs, logarithms, (digits == 0).long())
        )
        value = sign * (1 << exponent % 4) * (zeros == 0)
        return inputs, value.sum(1, keepdim=True) % MODULUS

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Let Python compute the expression."""
        return [evaluate(self.inputs[each] for each in inputs)]


class ParityCheck(BitTask):
    """Parity Check: the number of ones, modulo 2.

    1 0 1 1 1 -> 0
    0 0 0 1 0 1 1 1 0 1 1 -> 0
    """

    name = "parity-check"
    level = "regular"
    permutable = True

    def answer(self, bits: Strings) -> Int[Tensor, "batch 1"]:
        """Return the parity."""
        return bits.sum(1, keepdim=True) % 2

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Count the ones."""
        return [list(inputs).count(1) % 2]


class CycleNavigation(Task):
    """Cycle Navigation: the place on a cycle of five after a walk from 0.

    + - - - + -> 4
    - + + + 0 + - 0 -> 2
    """

    name = "cycle-navigation"
    level = "regular"
    inputs = ("-", "0", "+")
    outputs = tuple("01234")
    chance = blind = 20.0
    permutable = True

    def _sample(self, draw: Draw, length: int) -> tuple[Tensor, ...]:
        moves = draw.integers(3, length)
        return moves, (moves - 1).sum(1, keepdim=True) % MODULUS

    def solve(self, inputs: Sequence[int]) -> list[int]:
        """Walk."""
        place = 0
        for move in inputs:
            place = (place + move - 1) % MODULUS
        return [place]


def evaluate(symbols: Iterable[str]) -> int:
    """Return the value of digits, + - x and brackets, modulo 5, by Python's own arithmetic."""
    return int(eval("".join(symbols).replace("x", "*"), {"__builtins__": {}})) % MODULUS
