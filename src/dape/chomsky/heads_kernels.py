"""Triton kernels of DAPE's map across heads for groups of models, forward and backward.

The hidden units of a query and key stay in registers. A group has weights of its own and a bias
that its batch shares. Products are `tf32x3`, three products in TF32 for a float32 product. The
error is of the size of float32 rounding, and tensor cores compute them, in contrast to `ieee`.

DAPE V2 has `TAPS` taps along the keys, and R = TAPS // 2. A query has hidden units at its keys and
at R keys after the last. The first layer loads every key with its neighbours. The second layer
takes neighbours from the tile, and tiles in a row overlap by 2 R keys. DAPE has one tap and R = 0.

Suffixes: N keys of a tile, P taps by heads, H heads, D hidden units.
"""

import triton
import triton.language as tl

VARYING = ["batch", "queries", "keys", "bias_g", "w1_g", "b1_g", "w2_g", "b2_g"]  # not compiled in


@triton.jit
def locate(queries, keys, TAPS: tl.constexpr, N: tl.constexpr):
    """Return query and key of the units `[N]` of a tile, and masks: inside, and of no other tile.

    Units after the last key have keys from `keys` on.
    """
    R: tl.constexpr = TAPS // 2
    lane = tl.arange(0, N)
    unit = tl.program_id(0) * (N - 2 * R) - R + lane
    query = unit // (keys + R)
    inside = (unit >= 0) & (query < queries)
    return query, unit - query * (keys + R), inside, inside & (lane >= R) & (lane < N - R)


@triton.jit
def columns(H: tl.constexpr, HEADS: tl.constexpr, TAPS: tl.constexpr, P: tl.constexpr):
    """Return head, tap and shift of the columns `[P]`, and a mask of columns in use."""
    column = tl.arange(0, P)
    head, tap = column % HEADS, column // HEADS
    return head, tap, tap - TAPS // 2, (head < H) & (tap < TAPS)


@triton.jit
def places(query, key, inside, head, shift, used, queries, keys):
    """Return the places `[P, N]` of shifted keys in the scores, and a mask of places inside."""
    moved = key[None, :] + shift[:, None]
    at_PN = (head[:, None] * queries + query[None, :]) * keys + moved
    return at_PN, used[:, None] & inside[None, :] & (moved >= 0) & (moved < keys)


@triton.jit
def load_scores(x, at_PN, there_PN):
    """Return the numbers `[N, P]`; the lanes of a warp load along the keys."""
    return tl.trans(tl.load(x + at_PN, there_PN, 0.0))


@triton.jit
def load_first(w1, units, head, tap, used, H: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr):
    """Return W1^T of A or of B as `[P, D]`."""
    at_PD = (units[None, :] * (2 * H) + head[:, None]) * TAPS + tap[:, None]
    return tl.load(w1 + at_PD, used[:, None] & (units < D)[None, :], 0.0)


@triton.jit
def load_second(w2, units, head, tap, used, D: tl.constexpr, TAPS: tl.constexpr):
    """Return W2 as `[P, D]`."""
    at_PD = (head[:, None] * D + units[None, :]) * TAPS + tap[:, None]
    return tl.load(w2 + at_PD, used[:, None] & (units < D)[None, :], 0.0)


@triton.jit
def load_weights(
    b_NP, w1, b1, w2, units, head, tap, turned, used,
    H: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Return W1_A^T, z = W1_B B + b1, which a batch shares, and W2 with taps in a turned order."""
    w1_PD = load_first(w1 + H * TAPS, units, head, tap, used, H, D, TAPS)
    z_ND = tl.load(b1 + units, units < D, 0.0)[None, :] + tl.zeros((b_NP.shape[0], 1), tl.float32)
    z_ND = tl.dot(b_NP, w1_PD, z_ND, input_precision="tf32x3")
    w1_PD = load_first(w1, units, head, tap, used, H, D, TAPS)
    return w1_PD, z_ND, load_second(w2, units, head, turned, used, D, TAPS)


@triton.jit
def hidden(a_NP, w1_PD, z_ND):
    """Return phi(W1_A A + z)."""
    z_ND = tl.dot(a_NP, w1_PD, z_ND, input_precision="tf32x3")
    return tl.where(z_ND > 0, z_ND, 0.01 * z_ND)


@triton.jit
def gathered(x_NP, key, shift, HEADS: tl.constexpr, TAPS: tl.constexpr):
    """Return the sums `[N, H]` over the taps of x at shifted keys, for keys of no other tile."""
    N: tl.constexpr = x_NP.shape[0]
    if TAPS > 1:
        lane = tl.arange(0, N)[:, None] + shift[None, :]
        x_NP = tl.gather(x_NP, lane & (N - 1), 0)
        x_NP = tl.where(key[:, None] + shift[None, :] >= 0, x_NP, 0.0)
        x_NP = tl.sum(tl.reshape(x_NP, (N, x_NP.shape[1] // HEADS, HEADS)), 1)
    return x_NP


@triton.jit
def unshifted(x, x_NP, at_HN, own_HN, TAPS: tl.constexpr):
    """Return the numbers `[N, H]` of keys of no other tile; a single tap has them in x already."""
    return x_NP if TAPS == 1 else load_scores(x, at_HN, own_HN)


@triton.jit(do_not_specialize=VARYING)
def heads_kernel(
    scores, bias, w1, b1, w2, b2, out, batch, queries, keys, bias_g, w1_g, b1_g, w2_g, b2_g,
    H: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
    UNITS: tl.constexpr, N: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Y = A + B + W2 phi(W1 [A; B] + b1) + b2; grid (tiles of keys, groups, shares of a batch)."""
    g, units = tl.program_id(1).to(tl.int64), tl.arange(0, UNITS)
    query, key, inside, own = locate(queries, keys, TAPS, N)
    head, tap, shift, used = columns(H, HEADS, TAPS, P)
    at_PN, there_PN = places(query, key, inside, head, shift, used, queries, keys)
    heads = tl.arange(0, HEADS)
    at_HN, own_HN = places(query, key, own, heads, 0 * heads, heads < H, queries, keys)
    bias, w1, b1, w2 = bias + g * bias_g, w1 + g * w1_g, b1 + g * b1_g, w2 + g * w2_g
    b_NP = load_scores(bias, at_PN, there_PN)
    w1_PD, z_ND, w2_PD = load_weights(b_NP, w1, b1, w2, units, head, tap, tap, used, H, D, TAPS)
    c_NH = tl.load(b2 + g * b2_g + heads, heads < H, 0.0)[None, :]
    if RESIDUAL:
        c_NH += load_scores(bias, at_HN, own_HN)
    for b in range(tl.program_id(2), batch, tl.num_programs(2)):
        first = (g * batch + b) * H * queries * keys
        a_NP = load_scores(scores + first, at_PN, there_PN)
        h_ND = hidden(a_NP, w1_PD, z_ND)
        y_NP = tl.dot(h_ND, tl.trans(w2_PD), input_precision="tf32x3")
        y_NH = gathered(y_NP, key, shift, HEADS, TAPS) + c_NH
        y_NH += unshifted(scores + first, a_NP, at_HN, own_HN, TAPS)
        tl.store(out + first + at_HN, tl.trans(y_NH), own_HN)


@triton.jit(do_not_specialize=VARYING)
def heads_backward_kernel(
    scores, bias, w1, b1, w2, grad, grad_scores, grad_bias, sums,
    batch, queries, keys, bias_g, w1_g, b1_g, w2_g,
    H: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
    UNITS: tl.constexpr, N: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Gradients of A and B, and sums of a tile for those of the weights; grid (tiles, groups).

    With z = W1 [A; B] + b1: dz = phi'(z) W2^T dY and dA = W1_A^T dz + dY. The gradient of B has
    W1_B, and sums of dz and dY over the batch. In transposed products the taps turn round.
    """
    g, units = tl.program_id(1).to(tl.int64), tl.arange(0, UNITS)
    query, key, inside, own = locate(queries, keys, TAPS, N)
    head, tap, shift, used = columns(H, HEADS, TAPS, P)
    at_PN, there_PN = places(query, key, inside, head, shift, used, queries, keys)
    heads = tl.arange(0, HEADS)
    at_HN, own_HN = places(query, key, own, heads, 0 * heads, heads < H, queries, keys)
    bias, w1, b1, w2 = bias + g * bias_g, w1 + g * w1_g, b1 + g * b1_g, w2 + g * w2_g
    b_NP = load_scores(bias, at_PN, there_PN)
    w1_PD, z_ND, w2_PD = load_weights(
        b_NP, w1, b1, w2, units, head, tap, TAPS - 1 - tap, used, H, D, TAPS
    )
    sum_z_ND, sum_y_NH = tl.zeros((N, UNITS), tl.float32), tl.zeros((N, HEADS), tl.float32)
    sum_w1_DP = tl.zeros((UNITS, P), tl.float32)
    sum_w2_DP = tl.zeros((UNITS, P), tl.float32)
    for b in range(batch):
        first = (g * batch + b) * H * queries * keys
        a_NP = load_scores(scores + first, at_PN, there_PN)
        dy_NP = load_scores(grad + first, at_PN, there_PN)
        h_ND = hidden(a_NP, w1_PD, z_ND)
        own_NP = tl.where(own[:, None], dy_NP, 0.0)
        sum_w2_DP = tl.dot(tl.trans(h_ND), own_NP, sum_w2_DP, input_precision="tf32x3")
        dh_ND = tl.dot(dy_NP, w2_PD, input_precision="tf32x3")
        dz_ND = tl.where(h_ND > 0, dh_ND, 0.01 * dh_ND)
        own_NP = tl.where(own[:, None], a_NP, 0.0)
        sum_w1_DP = tl.dot(tl.trans(dz_ND), own_NP, sum_w1_DP, input_precision="tf32x3")
        dx_NP = tl.dot(dz_ND, tl.trans(w1_PD), input_precision="tf32x3")
        dy_NH = unshifted(grad + first, dy_NP, at_HN, own_HN, TAPS)
        dx_NH = gathered(dx_NP, key, -shift, HEADS, TAPS) + dy_NH
        tl.store(grad_scores + first + at_HN, tl.trans(dx_NH), own_HN)
        sum_z_ND += dz_ND
        sum_y_NH += dy_NH
    w1_PD = load_first(w1 + H * TAPS, units, head, tap, used, H, D, TAPS)
    b_NP = load_scores(bias, at_PN, there_PN & own[None, :])
    sum_w1b_DP = tl.dot(tl.trans(sum_z_ND), b_NP, input_precision="tf32x3")
    dx_NP = tl.dot(sum_z_ND, tl.trans(w1_PD), input_precision="tf32x3")
    dx_NH = gathered(dx_NP, key, -shift, HEADS, TAPS)
    if RESIDUAL:
        dx_NH += sum_y_NH
    grad_bias += g * H * queries * keys
    tl.store(grad_bias + at_HN, tl.trans(dx_NH), own_HN)
    sums += (g * tl.num_programs(0) + tl.program_id(0)) * (3 * H * D * TAPS + D + H)
    used_DP, unit = (units < D)[:, None] & used[None, :], units[:, None]
    at_DP = (unit * (2 * H) + head[None, :]) * TAPS + tap[None, :]
    tl.store(sums + at_DP, sum_w1_DP, used_DP)
    tl.store(sums + at_DP + H * TAPS, sum_w1b_DP, used_DP)
    sums += 2 * H * D * TAPS
    tl.store(sums + units, tl.sum(tl.where(own[:, None], sum_z_ND, 0.0), 0), units < D)
    sums += D
    at_DP = (head[None, :] * D + unit) * TAPS + TAPS - 1 - tap[None, :]
    tl.store(sums + at_DP, sum_w2_DP, used_DP)
    sums += H * D * TAPS
    tl.store(sums + heads, tl.sum(sum_y_NH, 0), heads < H)
