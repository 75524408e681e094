"""The sums by distance that the blocks of `backward.cu` leave behind, put together."""

# mypy: ignore-errors
# Triton's language, whose types are not Python's.

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
    M: tl.constexpr, K: tl.constexpr, DISTANCES: tl.constexpr, TERMS: tl.constexpr,
    gate, GATED: tl.constexpr,
):  # fmt: skip
    """Store, or ADD, the gradients of C `[H, N]` and U `[N, D]` of a band; grid (distances).

    Row tile i has K distances for each of its steps, those of step n from M i - K n + M - K + shift
    on. Each of its `parts` has `span` tiles of keys and as many steps, and one more behind its last
    tile, which is the first step of the next part too.
    """
    if unwanted(gate, GATED):
        return
    d, c = tl.program_id(0) * DISTANCES + tl.arange(0, DISTANCES), tl.arange(0, WIDE)
    total = tl.zeros((DISTANCES, WIDE), tl.float32)
    for negative in tl.static_range(1 if CAUSAL else 2):
        from_first = (-d if negative else d) - (M - K + shift)
        real = (d > 0) & (d < count) if negative else d < count
        for start in range(0, batch * row_tiles, TERMS):
            n = start + tl.arange(0, TERMS)
            first_row = n % row_tiles * M
            end = tl.full((TERMS,), 0, tl.int32) + keys
            if CAUSAL:
                end = tl.minimum(end, tl.minimum(rows, first_row + M) + shift)
            tiles = (tl.maximum(end, 0) + K - 1) // K
            place = from_first[None, :] - first_row[:, None]
            line = place & (K - 1)
            step = (line - place) // K
            inside = (n < batch * row_tiles)[:, None] & real[None, :] & (step >= 0)
            for behind in tl.static_range(2):
                part = tl.maximum(step - behind, 0) // span
                local = step - part * span
                if behind:
                    last = (local == span) | (step == tiles[:, None])
                    good = inside & (step > 0) & (step <= tiles[:, None]) & last
                else:
                    good = inside & (step < tiles[:, None])
                at = (n.to(tl.int64)[:, None] * parts + part) * (span + 1) + local
                at = (at * K + line) * COLUMNS
                wanted = good[:, :, None] & (c < COLUMNS)[None, None, :]
                total += tl.sum(tl.load(slots + at[:, :, None] + c[None, None, :], wanted, 0.0), 0)
    total *= tl.load(unit)
    at_u = hidden + d[:, None] * D + c[None, :]
    at_c = static + (c - UNITS)[None, :] * count + d[:, None]
    of_u = (d < count)[:, None] & (c < D)[None, :]
    of_c = (d < count)[:, None] & ((c >= UNITS) & (c < UNITS + H))[None, :]
    if ADD:
        total += tl.load(at_u, of_u, 0.0) + tl.load(at_c, of_c, 0.0)
    tl.store(at_u, total, of_u)
    tl.store(at_c, total, of_c)
