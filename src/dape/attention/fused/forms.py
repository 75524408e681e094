"""Biases of few parameters as Triton sees them: B and its derivatives at one distance.

A form is called with the distance, the head, the number of heads, and two parameters of the head as
the module keeps them; it returns B and the derivatives by both. Everything is float64: a table has
few entries, and what comes of B is then as exact as float32 is. A bias without a form is a table
too, made by its own module, and autograd takes the way back.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import nn

from dape.positions.bias import ALiBi, Kerple, KerplePower, NoBias


class Form(NamedTuple):
    """A function in Triton, and the names of up to two parameters `[H]` that it takes."""

    function: Any
    parameters: tuple[str, ...] = ()


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) and its derivative."""
    shrunk = tl.exp(-tl.abs(x))
    sigmoid = tl.where(x > 0, 1.0, shrunk) / (1.0 + shrunk)
    return tl.maximum(x, 0.0) + tl.log(1.0 + shrunk), sigmoid


@triton.jit
def nothing(delta, head, heads, x, y):
    """B = 0."""
    return delta * 0.0, delta * 0.0, delta * 0.0


@triton.jit
def alibi(delta, head, heads, x, y):
    """B = -s_h delta with the slopes of `ALiBi`."""
    even = tl.exp2(tl.floor(tl.log2(heads) + 1e-9))
    exponent = tl.where(head < even, (head + 1) * 8 / even, (2 * (head - even) + 1) * 4 / even)
    return -tl.exp2(-exponent) * delta, delta * 0.0, delta * 0.0


@triton.jit
def kerple(delta, head, heads, raw_p, raw_a):
    """B = -p log(1 + a delta), p and a by softplus."""
    p, by_p = softplus(raw_p)
    a, by_a = softplus(raw_a)
    log = tl.log(1.0 + a * delta)
    return -p * log, -log * by_p, -p * delta / (1.0 + a * delta) * by_a


@triton.jit
def kerple_power(delta, head, heads, raw_p, raw_a):
    """B = -a delta^p, p by twice a sigmoid, a by softplus."""
    p = 2.0 / (1.0 + tl.exp(-raw_p))
    a, by_a = softplus(raw_a)
    log = tl.log(tl.maximum(delta, 1.0))
    power = tl.where(delta > 0, tl.exp(p * log), 0.0)
    return -a * power, -a * power * log * p * (1.0 - p / 2), -power * by_a


FORMS: dict[type[nn.Module], Form] = {
    NoBias: Form(nothing),
    ALiBi: Form(alibi),
    Kerple: Form(kerple, ("raw_p", "raw_a")),
    KerplePower: Form(kerple_power, ("raw_p", "raw_a")),
}
