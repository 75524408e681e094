"""Biases of few parameters in Triton: B and the derivatives at a distance.

A form takes the distance, the head, the number of heads, and two parameters of the head as in the
module, and returns B and the derivatives by both. All numbers are float64, which is cheap for a
table of few entries and keeps float32 results exact. For a bias without a form, the module makes
the table, and autograd takes the gradient of the table back.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import nn

from dape.positions.bias import ALiBi, Kerple, KerplePower, NoBias


class Form(NamedTuple):
    """A function in Triton, and the names of up to two parameters `[H]`."""

    function: Any
    parameters: tuple[str, ...] = ()


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) and the derivative."""
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
