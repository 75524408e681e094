"""Triton kernels of the tables U and C of a bias and an adapter, forward and backward.

Entries n are distances, or features of FIRE. B comes from a form of few parameters, or is given.
For the parts V of W1 on the bias and A on the scores:

    U = V B + b1        C = [B] + b2 + W2 phi(U)        W1 = A

LINEAR tables (DAPE V2, FIRE) have no W2 phi(U) in C. DAPE V2 has U for every tap, without b1. For
FIRE, b1 and b2 meet only the first entry, the constant feature (ONE_CONSTANT). T5 has a parameter
`[ROWS, H]`, a row for each bucket of distances.

`tiles` has the legend; N are the entries of a tile.
"""

import triton
import triton.language as tl

from dape.attention.fused.tiles import follow

# Sizes that change with every token of decoding. Triton would compile a further kernel for
# multiples of 16.
GROWING = ("count", "offset")


@triton.jit
def bias_values(
    values, p0, p1, n, heads, count, span,
    H: tl.constexpr, FORM: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return B `[N, HEADS]` and the derivatives by the two parameters, zeros outside.

    With ROWS the form is the row of a parameter `[ROWS, H]`, and there are no derivatives.
    """
    inside = (n < count)[:, None] & (heads < H)[None, :]
    if ROWS > 0:
        at = FORM(n, span, ROWS)[:, None] * H + heads[None, :]
        value = tl.load(p0 + at, inside, 0.0)
        by_x, by_y = value, value
    elif GIVEN:
        at = heads[None, :].to(tl.int64) * count + n[:, None]
        value = tl.load(values + at, inside, 0.0)
        by_x, by_y = value, value
    else:
        delta_NH = n[:, None].to(tl.float64) + 0.0 * heads[None, :].to(tl.float64)
        value, by_x, by_y = FORM(delta_NH, heads[None, :], H, p0, p1)
        value = tl.where(inside, value, 0.0)
        by_x, by_y = tl.where(inside, by_x, 0.0), tl.where(inside, by_y, 0.0)
    return value.to(tl.float32), by_x.to(tl.float32), by_y.to(tl.float32)


@triton.jit
def load_tap(
    weight, tap, start, heads, units, channels,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return a tap of W1 `[D, channels, T]` from column `start` on, `[HEADS, UNITS]`."""
    inside = (heads[:, None] < H) & (units[None, :] < D)
    at = units[None, :] * (channels * T) + (start + heads[:, None]) * T + tap
    return tl.load(weight + at, inside, 0.0).to(tl.float32)


@triton.jit
def load_out(weight, heads, units, H: tl.constexpr, D: tl.constexpr):
    """Return W2 `[HEADS, UNITS]`."""
    inside = (heads[:, None] < H) & (units[None, :] < D)
    return tl.load(weight + heads[:, None] * D + units[None, :], inside, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=GROWING)
def static_table_kernel(
    p0, p1, static, jacobian, count, span,
    H: tl.constexpr, HEADS: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr,
    DERIVATIVES: tl.constexpr, N: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """C = B of a form, and so many DERIVATIVES by the parameters; grid (entries)."""
    follow(CHAINED)
    n, heads = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, HEADS)
    b_NH, x_NH, y_NH = bias_values(static, p0, p1, n, heads, count, span, H, FORM, False, ROWS)
    inside = (n < count)[:, None] & (heads < H)[None, :]
    at = heads[None, :].to(tl.int64) * count + n[:, None]
    tl.store(static + at, b_NH, inside)
    if DERIVATIVES > 0:
        tl.store(jacobian + at, x_NH, inside)
    if DERIVATIVES > 1:
        tl.store(jacobian + at + H * count.to(tl.int64), y_NH, inside)


@triton.jit(do_not_specialize=GROWING)
def tables_kernel(
    values, p0, p1, w1, b1, w2, b2, static, hidden, w_in, w_out, count, span, channels,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    FORM: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, ON_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, LINEAR: tl.constexpr, ONE_CONSTANT: tl.constexpr, N: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """C `[H, N]`, U `[N, T D]`, W1 `[T D, H]` and W2 `[H, T D]`; grid (entries).

    ON_BIAS is the first column of W1 on B, or -1.
    """
    follow(CHAINED)
    n, heads = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, HEADS)
    units = tl.arange(0, UNITS)
    b_NH, _x, _y = bias_values(values, p0, p1, n, heads, count, span, H, FORM, GIVEN, ROWS)
    constant_N = (n == 0).to(tl.float32) if ONE_CONSTANT else (n < count).to(tl.float32)
    b1_D = tl.load(b1 + units, units < D, 0.0).to(tl.float32)
    b2_H = tl.load(b2 + heads, heads < H, 0.0).to(tl.float32)
    c_NH = constant_N[:, None] * b2_H[None, :]
    if RESIDUAL:
        c_NH += b_NH
    for tap in tl.static_range(T):
        u_ND = tl.zeros((N, UNITS), tl.float32)
        if T == 1:
            u_ND += constant_N[:, None] * b1_D[None, :]
        if ON_BIAS >= 0:
            v_HD = load_tap(w1, tap, ON_BIAS, heads, units, channels, H, D, T)
            u_ND = tl.dot(b_NH, v_HD, u_ND, input_precision="ieee")
        at = hidden + n[:, None].to(tl.int64) * (T * D) + tap * D + units[None, :]
        tl.store(at, u_ND, (n < count)[:, None] & (units < D)[None, :])
        if not LINEAR:
            phi_ND = tl.where(u_ND > 0, u_ND, 0.01 * u_ND)
            w2_HD = load_out(w2, heads, units, H, D)
            c_NH = tl.dot(phi_ND, tl.trans(w2_HD), c_NH, input_precision="ieee")
    at = static + heads[None, :].to(tl.int64) * count + n[:, None]
    tl.store(at, c_NH, (n < count)[:, None] & (heads < H)[None, :])
    if tl.program_id(0) == 0:
        inside = (heads[:, None] < H) & (units[None, :] < D)
        for tap in tl.static_range(T):
            a_HD = load_tap(w1, tap, 0, heads, units, channels, H, D, T)
            tl.store(w_in + (tap * D + units[None, :]) * H + heads[:, None], a_HD, inside)
            line = w2 + heads[:, None] * (D * T) + units[None, :] * T + tap
            o_HD = tl.load(line, inside, 0.0).to(tl.float32)
            tl.store(w_out + heads[:, None] * (T * D) + tap * D + units[None, :], o_HD, inside)


@triton.jit
def tables_backward_kernel(
    values, p0, p1, w1, b1, w2, grad_static, grad_hidden, grad_values, parts,
    count, span, channels, per_program, size,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    FORM: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, MOST_ROWS: tl.constexpr,
    ON_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, LINEAR: tl.constexpr,
    ONE_CONSTANT: tl.constexpr, MIXED: tl.constexpr, N: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradients by p, b2, b1, V and W2 over some entries; grid (parts).

    A part holds the padded sums in a row, the sums of a parameter `[ROWS, H]` last. Without MIXED
    the only table is C = B, with ROWS. For a given B the kernel stores the gradient of B.
    """
    follow(CHAINED)
    heads, units = tl.arange(0, HEADS), tl.arange(0, UNITS)
    sum_x = tl.zeros((HEADS,), tl.float32)
    sum_y = tl.zeros((HEADS,), tl.float32)
    sum_b2 = tl.zeros((HEADS,), tl.float32)
    sum_b1 = tl.zeros((UNITS,), tl.float32)
    sum_w2 = tl.zeros((HEADS, UNITS), tl.float32)
    if ROWS > 0:
        rows = tl.arange(0, MOST_ROWS)
        sum_RH = tl.zeros((MOST_ROWS, HEADS), tl.float32)
    first = tl.program_id(0) * per_program
    last = tl.minimum(first + per_program, count)
    of_taps = parts + tl.program_id(0).to(tl.int64) * size + 3 * HEADS + UNITS
    if MIXED:
        b1_D = tl.load(b1 + units, units < D, 0.0).to(tl.float32)
        for tap in tl.static_range(T):
            begin = of_taps + tap * HEADS * UNITS + heads[:, None] * UNITS + units[None, :]
            tl.store(begin, tl.zeros((HEADS, UNITS), tl.float32))
    for start in range(first, last, N):
        n = start + tl.arange(0, N)
        inside = (n < last)[:, None] & (heads < H)[None, :]
        b_NH, x_NH, y_NH = bias_values(values, p0, p1, n, heads, count, span, H, FORM, GIVEN, ROWS)
        at = heads[None, :].to(tl.int64) * count + n[:, None]
        gc_NH = tl.load(grad_static + at, inside, 0.0)
        gb_NH = gc_NH if RESIDUAL else gc_NH * 0.0
        if MIXED:
            constant_N = (n == 0).to(tl.float32) if ONE_CONSTANT else (n < last).to(tl.float32)
            sum_b2 += tl.sum(gc_NH * constant_N[:, None], 0)
            for tap in tl.static_range(T):
                live = (n < last)[:, None] & (units < D)[None, :]
                line = n[:, None].to(tl.int64) * (T * D) + tap * D + units[None, :]
                gu_ND = tl.load(grad_hidden + line, live, 0.0)
                u_ND = tl.zeros((N, UNITS), tl.float32) + constant_N[:, None] * b1_D[None, :]
                if T == 1:
                    sum_b1 += tl.sum(gu_ND * constant_N[:, None], 0)
                if ON_BIAS >= 0:
                    v_HD = load_tap(w1, tap, ON_BIAS, heads, units, channels, H, D, T)
                    gb_NH = tl.dot(gu_ND, tl.trans(v_HD), gb_NH, input_precision="ieee")
                    at_tap = of_taps + tap * HEADS * UNITS
                    at_tap += heads[:, None] * UNITS + units[None, :]
                    seen_NH = tl.where(inside, b_NH, 0.0)
                    added = tl.dot(tl.trans(seen_NH), gu_ND, input_precision="ieee")
                    tl.store(at_tap, tl.load(at_tap) + added)
                    u_ND = tl.dot(b_NH, v_HD, u_ND, input_precision="ieee")
                if not LINEAR:
                    phi_ND = tl.where(u_ND > 0, u_ND, 0.01 * u_ND)
                    sum_w2 = tl.dot(tl.trans(gc_NH), phi_ND, sum_w2, input_precision="ieee")
        if GIVEN:
            tl.store(grad_values + at, gb_NH, inside)
        elif ROWS > 0:
            row_RN = (FORM(n, span, ROWS)[None, :] == rows[:, None]) & (n < last)[None, :]
            sum_RH = tl.dot(row_RN.to(tl.float32), gb_NH, sum_RH, input_precision="ieee")
        else:
            sum_x += tl.sum(gb_NH * x_NH, 0)
            sum_y += tl.sum(gb_NH * y_NH, 0)
    parts += tl.program_id(0).to(tl.int64) * size
    tl.store(parts + heads, sum_x)
    tl.store(parts + HEADS + heads, sum_y)
    if MIXED:
        tl.store(parts + 2 * HEADS + heads, sum_b2)
        tl.store(parts + 3 * HEADS + units, sum_b1)
        at = heads[:, None] * UNITS + units[None, :]
        tl.store(of_taps + T * HEADS * UNITS + at, sum_w2)
    if ROWS > 0:
        tl.store(parts + size - MOST_ROWS * HEADS + rows[:, None] * HEADS + heads[None, :], sum_RH)


@triton.jit
def table_sums_kernel(
    parts, grad_w_in, grad_w_out, grad_p0, grad_p1, grad_b2, grad_b1, grad_w1, grad_w2,
    programs, size, channels,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr,
    ON_BIAS: tl.constexpr, LINEAR: tl.constexpr, MIXED: tl.constexpr,
    ROWS: tl.constexpr, MOST_ROWS: tl.constexpr, PROGRAMS: tl.constexpr, OUT: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Sum all parts, add the gradients of W1 and W2 on scores, and store; grid (entries)."""
    follow(CHAINED)
    n, p = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, PROGRAMS)
    at = p[:, None].to(tl.int64) * size + n[None, :]
    total = tl.sum(tl.load(parts + at, (p < programs)[:, None] & (n < size)[None, :], 0.0), 0)
    h = n % HEADS
    if ROWS > 0:
        row = (n - size + MOST_ROWS * HEADS) // HEADS
        there = (n >= size - MOST_ROWS * HEADS) & (row < ROWS) & (n < size) & (h < H)
        tl.store(grad_p0 + row * H + h, total, there)
    else:
        tl.store(grad_p0 + h, total, (n < HEADS) & (h < H))
        tl.store(grad_p1 + h, total, (n >= HEADS) & (n < 2 * HEADS) & (h < H))
    if MIXED:
        tl.store(grad_b2 + h, total, (n >= 2 * HEADS) & (n < 3 * HEADS) & (h < H))
        d = n - 3 * HEADS
        if T == 1:
            tl.store(grad_b1 + d, total, (d >= 0) & (d < D))
        m = d - UNITS
        tap, h, d = m // (HEADS * UNITS), m // UNITS % HEADS, m % UNITS
        inside = (m >= 0) & (h < H) & (d < D)
        of_w1 = inside & (tap < T)
        on_scores = tl.load(grad_w_in + (tap * D + d) * H + h, of_w1, 0.0)
        at = d * (channels * T) + h * T + tap
        if ON_BIAS > 0:
            tl.store(grad_w1 + at + ON_BIAS * T, total, of_w1)
        if ON_BIAS == 0:
            on_scores += total
        tl.store(grad_w1 + at, on_scores, of_w1)
        if LINEAR:
            through = tl.load(grad_w_out + h * (T * D) + tap * D + d, of_w1, 0.0)
            tl.store(grad_w2 + h * (D * T) + d * T + tap, through, of_w1)
        else:
            of_w2 = inside & (tap == T)
            through = tl.load(grad_w_out + h * D + d, of_w2, 0.0)
            tl.store(grad_w2 + h * D + d, total + through, of_w2)


@triton.jit(do_not_specialize=GROWING)
def fire_kernel(
    log_c, log_threshold, psi, scale, count, offset, N: tl.constexpr, CHAINED: tl.constexpr
):
    """psi(n) = log(1 + c n) over distances, 1 / psi(max(offset + n, L)) over indices; grid (n)."""
    follow(CHAINED)
    n = tl.program_id(0) * N + tl.arange(0, N)
    c = tl.exp(tl.load(log_c).to(tl.float64))
    threshold = tl.exp(tl.load(log_threshold).to(tl.float64))
    far = tl.maximum((n + offset).to(tl.float64), threshold)
    tl.store(psi + n, tl.log(1.0 + c * n.to(tl.float64)).to(tl.float32), n < count)
    tl.store(scale + n, (1.0 / tl.log(1.0 + c * far)).to(tl.float32), n < count)


@triton.jit
def fire_backward_kernel(
    log_c, log_threshold, grad_psi, grad_scale, grad_c, grad_threshold, count, offset,
    N: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Gradients of log c and log L from the gradients of psi and 1 / psi; a single program."""
    follow(CHAINED)
    c = tl.exp(tl.load(log_c).to(tl.float64))
    threshold = tl.exp(tl.load(log_threshold).to(tl.float64))
    by_c, by_threshold = tl.zeros((N,), tl.float64), tl.zeros((N,), tl.float64)
    for start in range(0, count, N):
        n = start + tl.arange(0, N)
        g_psi = tl.load(grad_psi + n, n < count, 0.0).to(tl.float64)
        g_scale = tl.load(grad_scale + n, n < count, 0.0).to(tl.float64)
        delta, index = n.to(tl.float64), (n + offset).to(tl.float64)
        far = tl.maximum(index, threshold)
        log = tl.log(1.0 + c * far)
        slope = -g_scale / (log * log * (1.0 + c * far))
        by_c += g_psi * delta / (1.0 + c * delta) + slope * far
        by_threshold += tl.where(index < threshold, slope * c, 0.0)
    tl.store(grad_c, tl.sum(by_c, 0) * c)
    tl.store(grad_threshold, tl.sum(by_threshold, 0) * threshold)
