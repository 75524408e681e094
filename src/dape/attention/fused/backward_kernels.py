"""The sums by distance that the blocks of `backward.cu` leave behind, put together."""

import triton
import triton.language as tl

from dape.attention.fused.kernels import unwanted

SIZES = ("batch", "row_tiles", "parts", "span", "rows", "keys", "shift", "count")


# Of any sizes: one kernel for all bands.
@triton.jit(do_not_specialize=SIZES)
def distances_kernel(
    slots, unit, static, hidden, batch, row_tiles, parts, span, rows, keys, shift, count,
    H: tl.constexpr, D: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr, CAUSAL: tl.constexpr, ADD: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, TERMS: tl.constexpr, gate, GATED: tl.constexpr,
):  # fmt: skip
    """Store, or ADD, the gradients of C `[H, N]` and U `[N, D]` of a band; grid (distances).

    Row tile i has K distances for each of its steps, those of step n from M i - K n + M - K + shift
    on. Each of its `parts` has `span` tiles of keys and as many steps, and one more behind its last
    tile, which is the first step of the next part too.
    """
    if unwanted(gate, GATED):
        return
    d, c = tl.program_id(0), tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.float32)
    for negative in tl.static_range(1 if CAUSAL else 2):
        from_first = (-d if negative else d) - (M - K + shift)
        first = (
            tl.maximum(0, from_first - K + M) // M
        )  # earlier tiles have no row so far from a key
        live = row_tiles - first
        for start in range(0, batch * live, TERMS):
            n = start + tl.arange(0, TERMS)
            tile = first + n % live
            first_row = tile * M
            end = tl.full((TERMS,), 0, tl.int32) + keys
            if CAUSAL:
                end = tl.minimum(end, tl.minimum(rows, first_row + M) + shift)
            tiles = (tl.maximum(end, 0) + K - 1) // K
            line = (from_first - first_row) & (K - 1)
            step = (line + first_row - from_first) // K
            inside = (n < batch * live) & (step >= 0)
            if negative:
                inside &= d > 0
            for behind in tl.static_range(2):
                part = tl.maximum(step - behind, 0) // span
                local = step - part * span
                if behind:
                    last = (local == span) | (step == tiles)
                    good = inside & (step > 0) & (step <= tiles) & last
                else:
                    good = inside & (step < tiles)
                block = ((n // live).to(tl.int64) * row_tiles + tile) * parts + part
                at = (block * (span + 1) + local) * K + line
                wanted = good[:, None] & (c < COLUMNS)[None, :]
                found = tl.load(slots + at[:, None] * COLUMNS + c[None, :], wanted, 0.0)
                total += tl.sum(found, 0)
    total *= tl.load(unit)
    at_u, at_c = hidden + d * D + c, static + (c - UNITS) * count + d
    of_u, of_c = c < D, (c >= UNITS) & (c < UNITS + H)
    if ADD:
        total += tl.load(at_u, of_u, 0.0) + tl.load(at_c, of_c, 0.0)
    tl.store(at_u, total, of_u)
    tl.store(at_c, total, of_c)
