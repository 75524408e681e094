"""Triton kernels of DAPE's map across heads for groups of models, forward and backward.

The hidden units of a query and key stay in registers. A group has weights of its own and a bias
that its batch shares. Queries and keys lie in a row of `pairs`. Products are `tf32x3`, three
products in TF32 for a float32 product. The error is of the size of float32 rounding, and tensor
cores compute them, in contrast to `ieee`.

Suffixes: N pairs of a tile, C channels, the H scores and then the H biases, D hidden units.
"""

import triton
import triton.language as tl

VARYING = ["batch", "pairs", "bias_g", "w1_g", "b1_g", "w2_g", "b2_g"]  # compiled for all values


@triton.jit
def places(channels, pairs, H: tl.constexpr, N: tl.constexpr):
    """Return the places `[N, C]` of a tile, and masks: of scores, of scores and channels inside."""
    n, head = tl.program_id(0) * N + tl.arange(0, N)[:, None], (channels < H)[None, :]
    at, there = channels[None, :] * pairs + n, n < pairs
    return at, head, there & head, there & (channels < 2 * H)[None, :]


@triton.jit
def load_weights(w1, b1, w2, channels, units, H: tl.constexpr, D: tl.constexpr):
    """Return W1^T and W2 as `[C, D]`, W2 with zeros for the biases, and b1."""
    inside = units[None, :] < D
    w1_CD = tl.load(
        w1 + units[None, :] * (2 * H) + channels[:, None], inside & (channels < 2 * H)[:, None], 0.0
    )
    w2_CD = tl.load(
        w2 + channels[:, None] * D + units[None, :], inside & (channels < H)[:, None], 0.0
    )
    return w1_CD, tl.load(b1 + units, units < D, 0.0), w2_CD


@triton.jit
def hidden(x_NC, w1_CD, b1_D):
    """Return z = W1 x + b1 and phi(z)."""
    z_ND = tl.dot(x_NC, w1_CD, input_precision="tf32x3") + b1_D[None, :]
    return z_ND, tl.where(z_ND > 0, z_ND, 0.01 * z_ND)


@triton.jit(do_not_specialize=VARYING)
def heads_kernel(
    scores, bias, w1, b1, w2, b2, out, batch, pairs, bias_g, w1_g, b1_g, w2_g, b2_g,
    H: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr,
    N: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Y = A + B + W2 phi(W1 [A; B] + b1) + b2; grid (tiles of pairs, groups, shares of a batch)."""
    g, channels, units = tl.program_id(1).to(tl.int64), tl.arange(0, CHANNELS), tl.arange(0, UNITS)
    at, head, inside, biased = places(channels, pairs, H, N)
    w1_CD, b1_D, w2_CD = load_weights(
        w1 + g * w1_g, b1 + g * b1_g, w2 + g * w2_g, channels, units, H, D
    )
    bias += g * bias_g
    b_NC = tl.load(bias + at - H * pairs, biased & ~head, 0.0)
    c_NC = tl.load(b2 + g * b2_g + channels, channels < H, 0.0)[None, :] + tl.zeros_like(b_NC)
    if RESIDUAL:
        c_NC += tl.load(bias + at, inside, 0.0)
    for b in range(tl.program_id(2), batch, tl.num_programs(2)):
        first = (g * batch + b) * H * pairs
        a_NC = tl.load(scores + first + at, inside, 0.0)
        _z, h_ND = hidden(a_NC + b_NC, w1_CD, b1_D)
        y_NC = tl.dot(h_ND, tl.trans(w2_CD), a_NC + c_NC, input_precision="tf32x3")
        tl.store(out + first + at, y_NC, inside)


@triton.jit(do_not_specialize=VARYING)
def heads_backward_kernel(
    scores, bias, w1, b1, w2, grad, grad_scores, grad_bias, sums,
    batch, pairs, bias_g, w1_g, b1_g, w2_g,
    H: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr,
    N: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Gradients of A and B, and sums of a tile for those of the weights; grid (tiles, groups).

    With x = [A; B] and z = W1 x + b1: dz = phi'(z) W2^T dY and dx = W1^T dz + [dY; dY].
    """
    g, channels, units = tl.program_id(1).to(tl.int64), tl.arange(0, CHANNELS), tl.arange(0, UNITS)
    at, head, inside, biased = places(channels, pairs, H, N)
    w1_CD, b1_D, w2_CD = load_weights(
        w1 + g * w1_g, b1 + g * b1_g, w2 + g * w2_g, channels, units, H, D
    )
    b_NC = tl.load(bias + g * bias_g + at - H * pairs, biased & ~head, 0.0)
    sum_x_NC, sum_y_NC = tl.zeros_like(b_NC), tl.zeros_like(b_NC)
    sum_z_ND = tl.zeros((N, UNITS), tl.float32)
    sum_w1_DC = tl.zeros((UNITS, CHANNELS), tl.float32)
    sum_w2_DC = tl.zeros((UNITS, CHANNELS), tl.float32)
    twice = tl.where(head, at, at - H * pairs)
    for b in range(batch):
        first = (g * batch + b) * H * pairs
        x_NC = tl.load(scores + first + at, inside, 0.0) + b_NC
        dx_NC = tl.load(grad + first + twice, biased if RESIDUAL else inside, 0.0)
        dy_NC = tl.where(head, dx_NC, 0.0)
        z_ND, h_ND = hidden(x_NC, w1_CD, b1_D)
        sum_w2_DC = tl.dot(tl.trans(h_ND), dy_NC, sum_w2_DC, input_precision="tf32x3")
        dh_ND = tl.dot(dy_NC, w2_CD, input_precision="tf32x3")
        dz_ND = tl.where(z_ND > 0, dh_ND, 0.01 * dh_ND)
        sum_w1_DC = tl.dot(tl.trans(dz_ND), x_NC, sum_w1_DC, input_precision="tf32x3")
        dx_NC = tl.dot(dz_ND, tl.trans(w1_CD), dx_NC, input_precision="tf32x3")
        tl.store(grad_scores + first + at, dx_NC, inside)
        sum_x_NC += dx_NC
        sum_y_NC += dy_NC
        sum_z_ND += dz_ND
    tl.store(grad_bias + g * H * pairs + at - H * pairs, sum_x_NC, biased & ~head)
    sums += (g * tl.num_programs(0) + tl.program_id(0)) * (3 * H * D + D + H)
    unit = (units < D)[:, None]
    at_w1 = units[:, None] * (2 * H) + channels[None, :]
    tl.store(sums + at_w1, sum_w1_DC, unit & (channels < 2 * H)[None, :])
    sums += 2 * H * D
    tl.store(sums + units, tl.sum(sum_z_ND, 0), units < D)
    sums += D
    tl.store(sums + channels[None, :] * D + units[:, None], sum_w2_DC, unit & head)
    sums += H * D
    tl.store(sums + channels, tl.sum(sum_y_NC, 0), channels < H)
