"""Arithmetic on rows of bits, against Python's integers."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dape.chomsky import binary

SIZES = st.integers(1, 600)


def naturals(size):
    return st.one_of(st.integers(0, 2**size - 1), st.sampled_from([0, 1, 2**size - 1]))


def row(value, size):
    return torch.tensor([[value >> place & 1 for place in range(size)]])


def value(bits):
    return binary.number(bits[0].tolist())


@given(st.data(), SIZES, st.integers(0, 1))
def test_sums(data, size, carry):
    x, y = data.draw(naturals(size)), data.draw(naturals(size))
    assert value(binary.add(row(x, size), row(y, size), carry)) == x + y + carry


@given(st.data(), SIZES, SIZES)
def test_products(data, first, second):
    x, y = data.draw(naturals(first)), data.draw(naturals(second))
    size = first + second
    assert value(binary.multiply(row(x, size), row(y, size))) == x * y


@given(st.data(), SIZES)
def test_square_roots(data, size):
    root = data.draw(naturals((size + 1) // 2))
    for x in (data.draw(naturals(size)), root**2, max(root**2 - 1, 0)):
        found = binary.square_root(row(x, max(size, x.bit_length())))
        assert value(found) == math.isqrt(x)


@given(st.data(), SIZES)
def test_widths(data, size):
    x = data.draw(naturals(size))
    assert binary.width(row(x, size)).item() == x.bit_length()
