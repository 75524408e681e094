"""Triton kernel of `turn.py`.

Shapes: B batch, H heads, T tokens, WIDTH dimensions of a head. Strides of batch, head and token
come as `_b, _h, _t`.
"""

import triton
import triton.language as tl


@triton.jit
def turn_kernel(
    x, cos, sin, out, rows, heads, length, x_b, x_h, x_t, out_b, out_h, out_t, waves_b, sign,
    WIDTH: tl.constexpr, PAIRS: tl.constexpr, PADDED: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows of out: pairs (i, i + PAIRS) turned, and a copy of the rest.

    cos and sin are `[T, PAIRS]`, with a stride of 0 over the batch, or `[B, T, PAIRS]`. PADDED and
    REST are powers of two, no less than PAIRS and the dimensions behind the pairs.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b, h, t = row // length // heads, row // length % heads, row % length
    source = x + (b * x_b + h * x_h + t * x_t)[:, None]
    target = out + (b * out_b + h * out_h + t * out_t)[:, None]
    pair = tl.arange(0, PADDED)[None, :]
    there = (row < rows)[:, None]
    known = there & (pair < PAIRS)
    wave = (b * waves_b + t * PAIRS)[:, None] + pair
    c, s = tl.load(cos + wave, known), sign * tl.load(sin + wave, known)
    first = tl.load(source + pair, known).to(tl.float32)
    second = tl.load(source + pair + PAIRS, known).to(tl.float32)
    tl.store(target + pair, first * c - second * s, known)
    tl.store(target + pair + PAIRS, second * c + first * s, known)
    if REST > 0:
        rest = 2 * PAIRS + tl.arange(0, REST)[None, :]
        kept = there & (rest < WIDTH)
        tl.store(target + rest, tl.load(source + rest, kept), kept)
