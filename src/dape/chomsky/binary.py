"""Exact arithmetic on natural numbers of any size, as rows of bits, least significant bit first."""

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

Bits = Int[Tensor, "*batch bits"]


def add(x: Bits, y: Bits, carry: int = 0) -> Int[Tensor, "*batch more"]:
    """Return the bits of x + y + carry, with a bit more than x and y.

    The carry into a digit is the bit of x at the nearest lower digit with equal bits of x and y.
    Two ones make a carry, and two zeros end a carry. Without a lower digit of equal bits the carry
    is `carry`.
    """
    index = torch.arange(1, x.shape[-1] + 1, device=x.device)
    agree = torch.where(x == y, index, 0).cummax(-1).values
    carries = pad(pad(x, (1, 0), value=carry).gather(-1, agree), (1, 0), value=carry)
    return pad(x ^ y, (0, 1)) ^ carries


def multiply(x: Bits, y: Bits) -> Bits:
    """Return the bits of x y, which must fit into the width of x and y.

    The coefficients of the product of two polynomials are at most the number of bits. The binary
    digits of the coefficients are numbers to add, shifted by their weights.
    """
    bits = x.shape[-1]
    windows = pad(y, (bits - 1, 0)).unfold(-1, bits, 1).float()  # exact: small integers
    coefficients = (windows @ x.flip(-1)[..., None].float()).squeeze(-1).long()
    planes = 1 << (bits.bit_length() - 1).bit_length()  # a power of two, at least `bits`
    numbers = torch.stack([pad(coefficients >> k & 1, (k, 0))[..., :bits] for k in range(planes)])
    while len(numbers) > 1:
        first, second = numbers.chunk(2)
        numbers = add(first, second)[..., :bits]
    return numbers[0]


def square_root(x: Bits) -> Int[Tensor, "*batch half"]:
    """Return the bits of floor(sqrt(x)), half the width of x, rounded up.

    The digits come from the highest to the lowest, as on paper. With the next two bits in the
    remainder R, the root r and R become 2 r + 1 and R - (4 r + 1), if not negative, and otherwise 2
    r and R.
    """
    half = (x.shape[-1] + 1) // 2
    pairs = pad(x, (0, 2 * half - x.shape[-1])).unflatten(-1, (half, 2))
    remainder = root = torch.zeros_like(pairs[..., 0])
    remainder = root = pad(root, (0, 2))  # of half + 2 bits
    for place in reversed(range(half)):
        remainder = torch.cat((pairs[..., place, :], remainder[..., :-2]), -1)
        trial = pad(root[..., :-2], (2, 0))
        trial[..., 0] = 1
        difference = add(remainder, 1 - trial, carry=1)  # two's complement
        enough = difference[..., -1:]
        remainder = torch.where(enough == 1, difference[..., :-1], remainder)
        root = torch.cat((enough, root[..., :-1]), -1)
    return root[..., :half]


def width(x: Bits) -> Int[Tensor, "*batch 1"]:
    """Return the number of bits without leading zeros; 0 for the number 0."""
    index = torch.arange(1, x.shape[-1] + 1, device=x.device)
    return torch.where(x == 1, index, 0).amax(-1, keepdim=True)


def number(bits: list[int]) -> int:
    """Return the integer of some bits."""
    return sum(bit << place for place, bit in enumerate(bits))


def digits(value: int) -> list[int]:
    """Return the bits of an integer, empty for 0."""
    return [value >> place & 1 for place in range(value.bit_length())]
