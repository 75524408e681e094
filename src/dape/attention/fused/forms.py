"""Biases of few parameters in Triton: B and the derivatives at a distance.

A form takes the distance, the head, the number of heads, and the pointers of two parameters `[H]`
as in the module, and returns B and the derivatives by both. A form without parameters reads no
pointer. All numbers are float64, which is cheap for a table of few entries and keeps float32
results exact. The form of T5 takes the distance, the distance of the last row, and the number of
rows, and returns the row of T5's W. For a bias without a form, the module makes the table, and
autograd takes the gradient of the table back.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import nn

from dape.positions.bias import T5, ALiBi, Kerple, KerplePower, NoBias


class Form(NamedTuple):
    """A function in Triton, and the names of up to two parameters `[H]`.

    With a `span`, the name of a whole number, the function is the row of a parameter `[rows, H]`.
    """

    function: Any
    parameters: tuple[str, ...] = ()
    span: str | None = None


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) and the derivative."""
    shrunk = tl.exp(-tl.abs(x))
    sigmoid = tl.where(x > 0, 1.0, shrunk) / (1.0 + shrunk)
    return tl.maximum(x, 0.0) + tl.log(1.0 + shrunk), sigmoid


@triton.jit
def log(x):
    """Return log x for x >= 1, as exact as float32, at a third of the cost of a log in float64.

    For x = 2^k f with f about 1, log f = 2 artanh((f - 1) / (f + 1)).
    """
    y = x.to(tl.float32)
    bits = y.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23  # sqrt(1/2) <= f < sqrt(2)
    f = (bits - (k << 23)).to(tl.float32, bitcast=True)
    s = (f - 1.0) / (f + 1.0)
    z = s * s
    of_f = s * (2.0 + z * (2.0 / 3.0 + z * (2.0 / 5.0 + z * (2.0 / 7.0 + z * (2.0 / 9.0)))))
    return k.to(tl.float32) * 0.6931471805599453 + of_f + (y - y)  # no number for no number


@triton.jit
def parameter(of_heads, head, heads):
    """Return the parameter of a head, zero beyond the last head."""
    return tl.load(of_heads + head, head < heads, 0.0).to(tl.float64)


@triton.jit
def nothing(delta, head, heads, x, y):
    """B = 0."""
    return delta * 0.0, delta * 0.0, delta * 0.0


@triton.jit
def alibi(delta, head, heads, x, y):
    """B = -s_h delta with the slopes of `ALiBi`."""
    head = head.to(tl.float64)
    heads = head * 0.0 + heads
    even = tl.exp2(tl.floor(tl.log2(heads) + 1e-9))
    exponent = tl.where(head < even, (head + 1) * 8 / even, (2 * (head - even) + 1) * 4 / even)
    return -tl.exp2(-exponent) * delta, delta * 0.0, delta * 0.0


@triton.jit
def kerple(delta, head, heads, raw_p, raw_a):
    """B = -p log(1 + a delta), p and a by softplus."""
    p, by_p = softplus(parameter(raw_p, head, heads))
    a, by_a = softplus(parameter(raw_a, head, heads))
    logarithm = log(1.0 + a * delta)
    return -p * logarithm, -logarithm * by_p, -p * delta / (1.0 + a * delta) * by_a


@triton.jit
def kerple_power(delta, head, heads, raw_p, raw_a):
    """B = -a delta^p, p by twice a sigmoid, a by softplus."""
    p = 2.0 / (1.0 + tl.exp(-parameter(raw_p, head, heads)))
    a, by_a = softplus(parameter(raw_a, head, heads))
    log = tl.log(tl.maximum(delta, 1.0))
    power = tl.where(delta > 0, tl.exp(p * log), 0.0)
    return -a * power, -a * power * log * p * (1.0 - p / 2), -power * by_a


@triton.jit
def t5_bucket(delta, span, rows):
    """Return the bucket of `T5` with `rows` buckets and `max_distance` = `span`."""
    exact = rows // 2
    far = tl.maximum(delta, exact).to(tl.float64) / exact
    last = (delta * 0 + span).to(tl.float64) / exact
    whole = tl.log(far) / tl.log(last) * (rows - exact)
    # A whole number may come out just below.
    return tl.minimum(tl.minimum(delta, exact) + (whole + 1e-10).to(tl.int32), rows - 1)


FORMS: dict[type[nn.Module], Form] = {
    NoBias: Form(nothing),
    ALiBi: Form(alibi),
    Kerple: Form(kerple, ("raw_p", "raw_a")),
    KerplePower: Form(kerple_power, ("raw_p", "raw_a")),
    T5: Form(t5_bucket, ("weight",), "max_distance"),
}
