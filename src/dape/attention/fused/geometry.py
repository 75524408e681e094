"""One call of the fused kernels, and its geometry: bands of query rows, diagonals of tiles."""

from functools import lru_cache
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dape.attention.fused.kernels import BLOCK

# Scores that stand in the scratch at a time, two bytes each; half as many of four bytes.
SCORES_PER_BAND = 2**28
# The largest score, or entry of a table in the scratch, that 16 bits hold well enough. The largest
# log-sum-exp, which says how large tables are where they count: gradients of weights are sums of
# them. The largest number that may be made of scores on the way.
LARGEST_SCORE, LARGEST_SUM, LARGEST_NUMBER = 64.0, 128.0, 2.0**15
# Keys to a row of a band that is cut between keys.
ASPECT = 4
# Bands start, and keys of the scratch are padded, at multiples of this: whole tiles of every mixer.
ALIGNMENT = BLOCK.value


# Triton's functions of these names go through its compiler: microseconds a call, dozens a layer.
def cdiv(size: int, part: int) -> int:
    """Return how many parts cover a size."""
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    """Return the least power of two that is no less than a size."""
    return 1 << (size - 1).bit_length()


class Mixing(NamedTuple):
    """What mixes heads: C `[H, N]` and U `[N, D]` over the distances, W1 `[D, H]`, W2 `[H, D]`.

    Where a problem is `tabled`, C holds `W2 phi(U)`: what the logits are where A = 0.
    """

    static: Float[Tensor, "heads distances"]
    hidden: Float[Tensor, "distances hidden"]
    weight_in: Float[Tensor, "hidden heads"]
    weight_out: Float[Tensor, "heads hidden"]


class Features(NamedTuple):
    """FIRE's `f = (1, relu(weight x + bias))`, for `x = psi[|i - j|] scale[max(i, j)]`.

    The tables of the `Mixing` beside them are over these features: C `[H, 1 + F]`, U `[1 + F, D]`.
    """

    psi: Float[Tensor, "distances"]
    scale: Float[Tensor, "slots"]
    weight: Float[Tensor, "features"]
    bias: Float[Tensor, "features"]


class Gate(NamedTuple):
    """A number on the device, 1 if a problem needs a scratch of four bytes, and for which it is.

    Both ways are started, and a kernel that is not wanted returns at once: the host need not wait
    to learn which it is.
    """

    flag: Int[Tensor, "1"]
    wide: bool


class Problem(NamedTuple):
    """One call: the arguments every kernel needs, checked and in their final layout.

    Without `mixing`, `static` is C `[H, N]` over the distances 0..N-1, if there is a bias. `mask`
    is true for keys that may be seen. `features` are FIRE's. With `hidden_bias` b1 the layers are
    1 x k convolutions (DAPE V2), and the axes of units in `mixing` hold D for each tap; `halo` is
    how many of the first and last keys have no weight, and `begun` is true for elements that have
    seen a key before the first. With a `gate` the kernels run if it says so.
    """

    query: Float[Tensor, "batch heads rows head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    static: Float[Tensor, "heads distances"] | None
    mixing: Mixing | None
    mask: Bool[Tensor, "batch keys"] | None
    scale: float
    causal: bool
    offset: int
    features: Features | None = None
    hidden_bias: Float[Tensor, "hidden"] | None = None
    gate: Gate | None = None
    halo: tuple[int, int] = (0, 0)
    begun: Bool[Tensor, "batch"] | None = None

    @property
    def scratch(self) -> torch.dtype:
        """Return the dtype of the scratch."""
        wide = self.gate is not None and self.gate.wide
        return torch.float32 if wide or self.query.dtype == torch.float32 else torch.float16

    def gated(self) -> dict[str, Any]:
        """Return the arguments by which a kernel knows whether it is wanted."""
        if self.gate is None:
            return {"gate": self.query, "GATED": -1}
        return {"gate": self.gate.flag, "GATED": int(self.gate.wide)}

    def tables(self) -> tuple[Tensor, ...]:
        """Return tables and weights in the order of the operator."""
        found = self.mixing or (() if self.static is None else (self.static,))
        hidden_bias = () if self.hidden_bias is None else (self.hidden_bias,)
        return *found, *(self.features or ()), *hidden_bias

    @property
    def tabled(self) -> bool:
        """Return whether heads are mixed at each key alone, by tables over the distance."""
        return self.mixing is not None and self.features is None and self.hidden_bias is None

    @property
    def taps(self) -> int:
        """Return how many keys each layer sees at a time."""
        if self.mixing is None or self.hidden_bias is None:
            return 1
        return self.mixing.weight_in.shape[0] // self.hidden_bias.shape[0]

    def part(self, band: "Band") -> "Problem":
        """Return the problem of the elements and keys of a band, with all rows."""
        mask = self.mask
        return self._replace(
            query=self.query[band.batch],
            key=self.key[band.batch, :, band.keys],
            value=self.value[band.batch, :, band.keys],
            mask=None if mask is None else mask[band.batch, band.keys],
            begun=None if self.begun is None else self.begun[band.batch],
        )


class Band(NamedTuple):
    """Some rows of some elements of the batch, and keys that they see, as the scratch holds them.

    `shift` is the slot of the first row, counted from the first of the keys.
    """

    batch: slice
    rows: slice
    keys: slice
    shift: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return how many elements, rows and keys it has."""
        batch, rows, keys = (part.stop - part.start for part in self[:3])
        return batch, rows, keys


class Extent(NamedTuple):
    """What the bands of a problem depend on; without mixing there is no scratch.

    `numbers` is how many one of two scratches holds for a query and a key, one for each head; with
    convolutions there are four: scores, P, dA, and the hidden units.
    """

    batch: int
    rows: int
    keys: int
    offset: int
    causal: bool
    numbers: int | None

    @classmethod
    def of(cls, problem: Problem) -> "Extent":
        """Return that of a problem."""
        batch, heads, rows, _ = problem.query.shape
        numbers = heads if problem.mixing is not None else None
        if problem.hidden_bias is not None:
            numbers = cdiv(3 * heads + problem.hidden_bias.shape[0], 2)
        return cls(batch, rows, problem.key.shape[2], problem.offset, problem.causal, numbers)

    def visible(self, rows: int) -> int:
        """Return how many keys the first `rows` queries see among them, at least one."""
        return min(self.keys, max(1, self.offset + rows)) if self.causal else self.keys


def bands(problem: Problem) -> tuple[Band, ...]:
    """Return the bands of a problem: the whole, unless a scratch limits their size.

    Rows that see fewer keys come in higher bands, so that all are about as large.
    """
    return bands_of(Extent.of(problem), room(problem), False)


def blocks(problem: Problem) -> tuple[Band, ...]:
    """Return the bands of a problem, cut between keys where they would be wide and low.

    What the backward pass adds to for every band, dQ by row, dK and dV by key and the tables by
    distance, is then little beside its scores, however long the sequence. Convolutions along the
    keys need whole rows, and so does what balances them in float32.
    """
    cut = problem.hidden_bias is None and problem.scratch == torch.float16
    return bands_of(Extent.of(problem), room(problem), cut)


def room(problem: Problem) -> int:
    """Return how many scores the scratch of a problem may hold."""
    return SCORES_PER_BAND * 2 // problem.scratch.itemsize


@lru_cache(maxsize=256)
def bands_of(extent: Extent, scores: int, cut: bool) -> tuple[Band, ...]:
    """Return the bands for a scratch of so many scores; if `cut`, none far wider than high."""
    batch, rows = extent.batch, extent.rows
    found, start, largest = [], 0, 1
    while start < rows:
        height, pieces = rows - start, 1
        if extent.numbers is not None:
            room = scores // extent.numbers
            height = min(height, highest(extent, start, room))
            widest = max(ALIGNMENT, whole_blocks(isqrt(ASPECT * room)))
            if cut and start + height < rows and extent.visible(start + height) > widest:
                height = min(rows - start, max(ALIGNMENT, whole_blocks(room // widest)))
                pieces = cdiv(extent.visible(start + height), widest)
        keys = extent.visible(start + height)
        width = cdiv(cdiv(keys, pieces), ALIGNMENT) * ALIGNMENT
        largest = max(largest, height * width)
        found += [
            (slice(start, start + height), slice(first, min(keys, first + width)))
            for first in range(0, keys, width)
        ]
        start += height
    room = batch * largest if extent.numbers is None else scores // extent.numbers
    group = max(1, min(batch, room // largest))
    return tuple(
        Band(slice(first, min(batch, first + group)), band, keys, shift)
        for first in range(0, batch, group)
        for band, keys in found
        for shift in [extent.offset + band.start - keys.start]
    )


def whole_blocks(size: int) -> int:
    """Return the largest multiple of `ALIGNMENT` that is no more than a size."""
    return size // ALIGNMENT * ALIGNMENT


def highest(extent: Extent, start: int, room: int) -> int:
    """Return how many rows from `start` on fit a scratch of so many scores a head."""
    height = room // (cdiv(extent.keys, ALIGNMENT) * ALIGNMENT)
    if extent.causal:
        # Of h rows the last sees c + h keys, and the scratch is padded by less than a block.
        c = max(0, extent.offset + start) + ALIGNMENT
        height = max(height, (isqrt(c * c + 4 * room) - c) // 2)
    return max(ALIGNMENT, whole_blocks(height))


class Scratch(NamedTuple):
    """A buffer for the scores of one band at a time."""

    buffer: Tensor
    heads: int

    @classmethod
    def of(cls, problem: Problem, all_bands: tuple[Band, ...]) -> "Scratch":
        """Return a buffer for the largest of some bands of a problem."""
        heads = problem.query.shape[1]
        size = max(prod(cls.shape(band, heads)) for band in all_bands)
        return cls(problem.query.new_empty(size, dtype=problem.scratch), heads)

    @staticmethod
    def shape(band: Band, heads: int) -> tuple[int, int, int, int, int]:
        """Return the size of a band's scores, of whole blocks of keys."""
        batch, rows, keys = band.sizes
        return batch, rows, cdiv(keys, ALIGNMENT), heads, ALIGNMENT

    def view(self, band: Band) -> Float[Tensor, "group rows blocks heads keys"]:
        """Return the scores of a band."""
        shape = self.shape(band, self.heads)
        return self.buffer[: prod(shape)].view(shape)


class Diagonals(NamedTuple):
    """The diagonals of tiles of a band: q holds distances q K + offset + m - n, m < M, n < K.

    The first of them has place `slot` among those of the whole problem.
    """

    first: int
    number: int
    slot: int
    band_tile: int
    offset: int


def diagonals(
    problem: Problem, band: Band, tile_rows: int, tile_keys: int, reach: int = 0
) -> Diagonals:
    """Return the diagonals of a band for tiles of M rows and K keys, M dividing K.

    With a `reach` rows see so many keys more, and past the last: the hidden units of convolutions.
    """
    _, rows, keys = band.sizes
    lowest = lowest_diagonal(problem, tile_rows, tile_keys, reach)
    band_tile = (band.shift + reach) // tile_keys
    first = max(lowest, band_tile + 1 - cdiv(keys + reach, tile_keys))
    last_row = (cdiv(rows, tile_rows) - 1) * tile_rows
    last = band_tile + (last_row + tile_keys - 1) // tile_keys
    number = max(0, last + 1 - first)
    return Diagonals(first, number, first - lowest, band_tile, (problem.offset + reach) % tile_keys)


def lowest_diagonal(problem: Problem, tile_rows: int, tile_keys: int, reach: int = 0) -> int:
    """Return the first diagonal of a whole problem."""
    extent, offset = Extent.of(problem), problem.offset + reach
    first = offset // tile_keys + 1 - cdiv(extent.visible(extent.rows) + reach, tile_keys)
    if problem.causal:
        first = max(first, -((offset % tile_keys + tile_rows - 1) // tile_keys))
    return first


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of batch, head and row; the last axis is contiguous."""
    return tensor.stride()[:3]
