"""The kernels across heads for FIRE, whose tables are over features instead of distances.

    mix              X <- X + W2 phi(W1 X + U f) + C f
    mix_backward     X <- P, Y <- dA from Y = dO V^T, and the gradients of all that makes f

with `f = (1, relu(v x + c))` of `x = psi[|i - j|] scale[max(i, j)]` at each query and key. A tile
that moves along a diagonal sees the same psi all the way. Without hidden units, D = 0, X + C f is
what remains. Shapes as in `kernels`, and F features, of which the one that is 1 comes first in the
tables and stays apart here.
"""

import triton
import triton.language as tl

from dape.attention.fused.across_heads import load_weights, places_of_heads, tile_positions
from dape.attention.fused.tiles import LOG2E, diagonal_tiles, unwanted


@triton.jit
def load_feature_tables(
    hidden, static, heads, units, places,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Return U `[F, D]`, C `[F, H]`, and their rows `[D]` and `[H]` for the feature 1."""
    u_row, c_row = hidden + units, static + heads * (F + 1)
    u_1 = tl.load(u_row, units < D, 0.0)
    c_1 = tl.load(c_row, heads < H, 0.0)
    inside = places[:, None] < F
    u_FD = tl.load(u_row[None, :] + (places[:, None] + 1) * D, inside & (units < D)[None, :], 0.0)
    c_FH = tl.load(c_row[None, :] + (places[:, None] + 1), inside & (heads < H)[None, :], 0.0)
    return u_FD, c_FH, u_1, c_1


@triton.jit
def feature_mlp(
    x, f, w_in, w_out, one, u_FD, c_FH, u_1, c_1, D: tl.constexpr, PRECISION: tl.constexpr
):
    """Return z = W1 x + U f, phi(z) and y = x + W2 phi(z) + C f; if D = 0, y is x + C f."""
    y = tl.dot(x, one, input_precision=PRECISION) + c_1[None, :]
    y = tl.dot(f, c_FH, y, input_precision=PRECISION)
    z, hidden = y, x
    if D > 0:
        z = tl.dot(x, w_in, input_precision=PRECISION) + u_1[None, :]
        z = tl.dot(f, u_FD, z, input_precision=PRECISION)
        hidden = tl.where(z > 0, z, 0.01 * z).to(x.dtype)
        y = tl.dot(hidden, w_out, y, input_precision=PRECISION)
    return z, hidden, y


@triton.jit
def fire_mix_kernel(
    x, w1, w2, hidden_table, static_table, psi, scale, weight, bias, mask,
    num_rows, num_keys, table_size, first_diagonal, band_tile, offset, x_b, x_t, mask_b,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FEATURES: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    gate, GATED: tl.constexpr,
):  # fmt: skip
    """X <- X + W2 phi(W1 X + U f) + C f along one diagonal, -inf if unseen; grid (diagonals, B)."""
    if unwanted(gate, GATED):
        return
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    places = tl.arange(0, FEATURES)
    delta_ij = q * K + offset + n // K - n % K
    u_FD, c_FH, u_1, c_1 = load_feature_tables(
        hidden_table, static_table, heads, units, places, H, D, F
    )
    u_FD, c_FH = u_FD.to(compute), c_FH.to(compute)
    w1_HD, w2_HD = load_weights(w1, w2, heads, units, H, D)
    w_in, w_out = w1_HD.to(compute), tl.trans(w2_HD.to(compute))
    one = (heads[:, None] == heads[None, :]).to(compute)
    v = tl.load(weight + places, places < F, 0.0)[None, :]
    c = tl.load(bias + places, places < F, 0.0)[None, :]
    along = tl.load(psi + tl.abs(delta_ij), tl.abs(delta_ij) < table_size, 0.0)
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys, M, K)
    for tile in range(first, last):
        rows, keys, there, seen = tile_positions(
            tile, start, n, delta_ij, num_rows, num_keys, mask + b * mask_b,
            M, K, CAUSAL, MASKED,
        )  # fmt: skip
        live = there & (keys < num_keys)
        ratio = along * tl.load(scale + keys + tl.maximum(delta_ij, 0), live, 0.0)
        f = tl.maximum(v * ratio[:, None] + c, 0.0).to(compute)
        at = b.to(tl.int64) * x_b + places_of_heads(rows, keys, heads, x_t, H)
        inside = there[:, None] & (heads[None, :] < H)
        a = tl.where(seen[:, None], tl.load(x + at, inside, 0.0), 0.0)
        _z, _hidden, y = feature_mlp(a, f, w_in, w_out, one, u_FD, c_FH, u_1, c_1, D, PRECISION)
        s = tl.where(seen[:, None], y, float("-inf"))
        tl.store(x + at, s.to(compute), inside)


@triton.jit
def fire_mix_backward_kernel(
    x, y, w1, w2, hidden_table, static_table, psi, scale, weight, bias, lse, delta, mask,
    grad_w1, grad_w2, grad_hidden, grad_static, grad_psi, grad_weight, grad_bias, grad_scale,
    num_rows, num_keys, table_size, first_diagonal, band_tile, offset, slots,
    x_b, x_t, stat_b, stat_h, stat_t, mask_b, pair_b, pair_t,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    HEADS: tl.constexpr, UNITS: tl.constexpr, FEATURES: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    gate, GATED: tl.constexpr,
):  # fmt: skip
    """X <- P, Y <- dA along one diagonal, and its share of every gradient; grid (diagonals, B).

    dS and dz as in `mix_backward_kernel`; df = C^T dS + U^T dz where f > 0, dx = v . df, so that
    dpsi += dx scale along the diagonal. Rows cross diagonals: each pair's share of dscale, dx psi,
    is stored for itself.
    """
    if unwanted(gate, GATED):
        return
    compute = x.dtype.element_ty
    q, b = tl.program_id(0) + first_diagonal, tl.program_id(1)
    heads, units, n = tl.arange(0, HEADS), tl.arange(0, UNITS), tl.arange(0, M * K)
    places = tl.arange(0, FEATURES)
    delta_ij = q * K + offset + n // K - n % K
    u_FD, c_FH, u_1, c_1 = load_feature_tables(
        hidden_table, static_table, heads, units, places, H, D, F
    )
    u_FD, c_FH = u_FD.to(compute), c_FH.to(compute)
    w1_HD, w2_HD = load_weights(w1, w2, heads, units, H, D)
    w1_HD, w2_HD = w1_HD.to(compute), w2_HD.to(compute)
    one = (heads[:, None] == heads[None, :]).to(compute)
    v = tl.load(weight + places, places < F, 0.0)[None, :]
    c = tl.load(bias + places, places < F, 0.0)[None, :]
    along = tl.load(psi + tl.abs(delta_ij), tl.abs(delta_ij) < table_size, 0.0)
    sum_w1 = tl.zeros((UNITS, HEADS), tl.float32)
    sum_w2 = tl.zeros((HEADS, UNITS), tl.float32)
    sum_u = tl.zeros((FEATURES, UNITS), tl.float32)
    sum_u_1 = tl.zeros((UNITS,), tl.float32)
    sum_c = tl.zeros((FEATURES, HEADS), tl.float32)
    sum_c_1 = tl.zeros((HEADS,), tl.float32)
    sum_weight = tl.zeros((FEATURES,), tl.float32)
    sum_bias = tl.zeros((FEATURES,), tl.float32)
    sum_psi = tl.zeros((M * K,), tl.float32)
    first, last, start = diagonal_tiles(q, band_tile, num_rows, num_keys, M, K)
    for tile in range(first, last):
        rows, keys, there, seen = tile_positions(
            tile, start, n, delta_ij, num_rows, num_keys, mask + b * mask_b,
            M, K, CAUSAL, MASKED,
        )  # fmt: skip
        live = there & (keys < num_keys)
        inside, seen_heads = (
            there[:, None] & (heads[None, :] < H),
            seen[:, None] & (heads[None, :] < H),
        )
        across = tl.load(scale + keys + tl.maximum(delta_ij, 0), live, 0.0)
        ratio = (along * across)[:, None]
        f = tl.maximum(v * ratio + c, 0.0)
        positive = f > 0
        f = f.to(compute)
        at = b.to(tl.int64) * x_b + places_of_heads(rows, keys, heads, x_t, H)
        a = tl.where(seen[:, None], tl.load(x + at, inside, 0.0), 0.0)
        dp = tl.where(seen[:, None], tl.load(y + at, inside, 0.0), 0.0).to(tl.float32)
        z, hidden, logit = feature_mlp(
            a, f, w1_HD, tl.trans(w2_HD), one, u_FD, c_FH, u_1, c_1, D, PRECISION
        )
        logit = logit.to(compute).to(tl.float32)  # as the forward pass stored it
        stat = b * stat_b + heads[None, :] * stat_h + rows[:, None] * stat_t
        log_sum = tl.load(lse + stat, seen_heads, 0.0)
        shared = tl.load(delta + stat, seen_heads, 0.0)
        share = tl.where(seen_heads, tl.exp2((logit - log_sum) * LOG2E), 0.0)
        ds = share * (dp - shared)
        ds_lean = ds.to(compute)
        df = tl.dot(ds_lean, tl.trans(c_FH), input_precision=PRECISION)
        da = ds
        if D > 0:
            dh = tl.dot(ds_lean, w2_HD, input_precision=PRECISION)
            dz = tl.where(z > 0, dh, 0.01 * dh)
            dz_lean = dz.to(compute)
            da = tl.dot(dz_lean, tl.trans(w1_HD), ds, input_precision=PRECISION)
            df = tl.dot(dz_lean, tl.trans(u_FD), df, input_precision=PRECISION)
            sum_w2 = tl.dot(tl.trans(ds_lean), hidden, sum_w2, input_precision=PRECISION)
            sum_w1 = tl.dot(tl.trans(dz_lean), a, sum_w1, input_precision=PRECISION)
            sum_u = tl.dot(tl.trans(f), dz_lean, sum_u, input_precision=PRECISION)
            sum_u_1 += tl.sum(dz, 0)
        tl.store(x + at, share.to(compute), inside)
        tl.store(y + at, da.to(compute), inside)
        sum_c = tl.dot(tl.trans(f), ds_lean, sum_c, input_precision=PRECISION)
        sum_c_1 += tl.sum(ds, 0)
        df = tl.where(positive, df, 0.0)
        sum_weight += tl.sum(df * ratio, 0)
        sum_bias += tl.sum(df, 0)
        dx = tl.sum(df * v, 1)
        sum_psi += dx * across
        at = b.to(tl.int64) * pair_b + rows.to(tl.int64) * pair_t + keys
        tl.store(grad_scale + at, dx * along, live)
    slot = b * slots + tl.program_id(0)
    if D > 0:
        at_w1 = slot * UNITS * HEADS + units[:, None] * HEADS + heads[None, :]
        tl.store(grad_w1 + at_w1, tl.load(grad_w1 + at_w1) + sum_w1)
        at_w2 = slot * UNITS * HEADS + heads[:, None] * UNITS + units[None, :]
        tl.store(grad_w2 + at_w2, tl.load(grad_w2 + at_w2) + sum_w2)
        at_1 = slot * (FEATURES + 1) * UNITS + units
        tl.store(grad_hidden + at_1, tl.load(grad_hidden + at_1) + sum_u_1)
        at_u = at_1[None, :] + (places[:, None] + 1) * UNITS
        tl.store(grad_hidden + at_u, tl.load(grad_hidden + at_u) + sum_u)
    at_1 = slot * (FEATURES + 1) * HEADS + heads
    tl.store(grad_static + at_1, tl.load(grad_static + at_1) + sum_c_1)
    at_c = at_1[None, :] + (places[:, None] + 1) * HEADS
    tl.store(grad_static + at_c, tl.load(grad_static + at_c) + sum_c)
    at_f = slot * FEATURES + places
    tl.store(grad_weight + at_f, tl.load(grad_weight + at_f) + sum_weight)
    tl.store(grad_bias + at_f, tl.load(grad_bias + at_f) + sum_bias)
    lines = tl.arange(0, LINES)
    on_line = lines[:, None] == (n // K - n % K + K - 1)[None, :]
    at_l = slot * LINES + lines
    summed = tl.sum(tl.where(on_line, sum_psi[None, :], 0.0), 1)
    tl.store(grad_psi + at_l, tl.load(grad_psi + at_l) + summed)


@triton.jit
def add_pairs_kernel(
    pairs, total, batch, num_rows, num_keys, shift, pair_b, pair_t,
    CAUSAL: tl.constexpr, K: tl.constexpr, gate, GATED: tl.constexpr,
):  # fmt: skip
    """Add what pairs have to `total`, by the later of their indices; grid (indices).

    Indices are counted from the first key, and `shift` is that of the first row.
    """
    if unwanted(gate, GATED):
        return
    index, line = tl.program_id(0), tl.arange(0, K)
    row = index - shift
    total += index
    added = tl.zeros((K,), tl.float32)
    in_row = (row >= 0) & (row < num_rows)
    last_key = tl.where(in_row, tl.minimum(num_keys, index + 1), 0)
    last_row = tl.where(index < num_keys, tl.minimum(num_rows, row), 0)
    at_row, at_key = pairs + row.to(tl.int64) * pair_t, pairs + index
    for _element in range(batch):
        for first in range(0, last_key, K):
            keys = first + line
            added += tl.load(at_row + keys, keys < last_key, 0.0)
        if not CAUSAL:
            for first in range(0, last_row, K):
                rows = first + line
                added += tl.load(at_key + rows.to(tl.int64) * pair_t, rows < last_row, 0.0)
        at_row += pair_b
        at_key += pair_b
    tl.store(total, tl.load(total) + tl.sum(added, 0))
