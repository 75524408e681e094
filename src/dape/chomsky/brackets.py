"""Random bracketed expressions of an exact length, with their values modulo 5.

E(L), of L symbols, is a digit, `-d`, `(d)` or `(-d)` for L = 1 .. 4. Longer expressions are
`(E(a) op E(b))`, with a uniform on 1 .. L - 4 and b = L - 3 - a. Digits and operators are uniform.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dape.chomsky.regular import MODULUS
from dape.chomsky.task import Draw, Strings

OPERATORS = ("+", "-", "x")
MINUS = MODULUS + 1


def symbols(operators: int) -> tuple[str, ...]:
    """Return the symbols by id, for a number of operators."""
    return (*"01234", *OPERATORS[:operators], "(", ")")


class _Splits(NamedTuple):
    """The binary operations of a depth, by the index of the opening bracket."""

    here: Bool[Tensor, "batch length"]
    second: Int[Tensor, "batch length"]
    operator: Int[Tensor, "batch length"]


def expressions(draw: Draw, length: int, operators: int) -> tuple[Strings, Int[Tensor, "batch 1"]]:
    """Return a batch of E(length) over the first `operators` operators, and the values modulo 5.

    All expressions of a depth are split at once. The index of the first symbol identifies a
    subexpression, among subexpressions at its depth or deeper.
    """
    index = torch.arange(length, device=draw.device).expand(draw.batch, length)
    size = torch.where(index == 0, length, 0)  # of the subexpression that starts at an index
    tokens = torch.zeros_like(index)
    opening, closing = MODULUS + operators, MODULUS + operators + 1
    splits = []
    for _ in range(-(-(length - 4) // 4)):  # an operand has at least four symbols less
        here = size > 4
        left = 1 + draw.below((size - 4).clamp(min=1))
        operator = draw.integers(operators, length)
        splits.append(_Splits(here, index + left + 2, operator))
        _put(tokens, index, opening, here)
        _put(tokens, index + left + 1, MODULUS + operator, here)
        _put(tokens, index + size - 1, closing, here)
        parts = torch.where(here, 0, size)
        _put(parts, index + 1, left, here)
        _put(parts, index + left + 2, size - left - 3, here)
        size = parts
    bracketed, negative = size > 2, (size == 2) | (size == 4)
    digits = draw.integers(MODULUS, length)
    _put(tokens, index, opening, bracketed)
    _put(tokens, index + bracketed, MINUS, negative)
    _put(tokens, index + bracketed + negative, digits, size > 0)
    _put(tokens, index + size - 1, closing, bracketed)
    return tokens, _values(torch.where(negative, -digits, digits), splits)


def _put(
    target: Strings, index: Strings, value: Strings | int, where: Bool[Tensor, "batch length"]
) -> None:
    """Write values at indices of zeros in rows, for the entries of `where`."""
    target.scatter_add_(1, index.clamp(0, target.shape[1] - 1), value * where)


def _values(leaves: Strings, splits: Sequence[_Splits]) -> Int[Tensor, "batch 1"]:
    """Return the value of the whole, from the values of leaves and the operations, deepest last."""
    values = leaves
    for here, second, operator in reversed(splits):
        a, b = values.roll(-1, 1), values.gather(1, second.clamp(max=values.shape[1] - 1))
        results = torch.stack((a + b, a - b, a * b))
        result = results.gather(0, operator[None])[0] % MODULUS
        values = torch.where(here, result, values)
    return values[:, :1] % MODULUS
