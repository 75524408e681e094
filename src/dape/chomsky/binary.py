"""Exact arithmetic on natural numbers of any size, as rows of bits, least significant bit first."""

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

Bits = Int[Tensor, "*batch bits"]


def add(x: Bits, y: Bits, carry: int = 0) -> Int[Tensor, "*batch more"]:
    """Return the bits of x + y + carry, one more than those of x and y.

    The carry into a place is the bit of x at the nearest lower place where x and y agree: both 1
    make a carry, both 0 end one. Below the lowest such place it is `carry`.
    """
    index = torch.arange(1, x.shape[-1] + 1, device=x.device)
    agree = torch.where(x == y, index, 0).cummax(-1).values
    carries = pad(pad(x, (1, 0), value=carry).gather(-1, agree), (1, 0), value=carry)
    return pad(x ^ y, (0, 1)) ^ carries


def multiply(x: Bits, y: Bits) -> Bits:
    """Return the bits of x y, which must fit as many as x and y have.

    The coefficients of the product of two polynomials are at most the number of bits. Their binary
    digits are numbers to be added, each shifted by its weight.
    """
    bits = x.shape[-1]
    windows = pad(y, (bits - 1, 0)).unfold(-1, bits, 1).float()  # exact: small integers
    coefficients = (windows @ x.flip(-1)[..., None].float()).squeeze(-1).long()
    planes = 1 << (bits.bit_length() - 1).bit_length()  # a power of two that holds `bits`
    numbers = torch.stack([pad(coefficients >> k & 1, (k, 0))[..., :bits] for k in range(planes)])
    while len(numbers) > 1:
        first, second = numbers.chunk(2)
        numbers = add(first, second)[..., :bits]
    return numbers[0]


def square_root(x: Bits) -> Int[Tensor, "*batch half"]:
    """Return the bits of floor(sqrt(x)), half as many as those of x, rounded up.

    Digit by digit from the highest, as on paper: the root r of the bits so far and the remainder
    R become 2 r + 1 and R - (4 r + 1) with the next two bits if that is not negative.
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
    """Return how many bits a number has without leading zeros; 0 has none."""
    index = torch.arange(1, x.shape[-1] + 1, device=x.device)
    return torch.where(x == 1, index, 0).amax(-1, keepdim=True)


def number(bits: list[int]) -> int:
    """Return the integer of some bits."""
    return sum(bit << place for place, bit in enumerate(bits))


def digits(value: int) -> list[int]:
    """Return the bits of an integer, none for 0."""
    return [value >> place & 1 for place in range(value.bit_length())]
