"""A call in the form for kernels, bands of a call, and the result."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dape.attention.fused.sizes import WIDE_PROGRAMS
from dape.attention.fused.terms import Features, Terms, terms_of


class Gate(NamedTuple):
    """A flag on the device, and the value of the flag for which a kernel runs.

    The flag is 1 if a problem needs a scratch of four bytes. The host starts the kernels for two
    and for four bytes without waiting for the flag. An unwanted kernel returns at once.
    """

    flag: Int[Tensor, "1"]
    wide: bool


class Band(NamedTuple):
    """Some rows of some elements of the batch, and some visible keys, the content of the scratch.

    `shift` is the index of the first row, counted from the first key of the band. Earlier rows see
    the first `summed` keys. The `last` band of its rows has the last key that the rows see.
    """

    batch: slice
    rows: slice
    keys: slice
    shift: int
    summed: int
    last: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the numbers of elements, rows and keys."""
        batch, rows, keys = (part.stop - part.start for part in self[:3])
        return batch, rows, keys


class Problem(NamedTuple):
    """A call for kernels: arguments of every kernel, checked and in the final layout.

    `mask` is true for visible keys. `halo` and `begun` are for `Taps` alone: the numbers of first
    and last keys without weight, and elements with a visible key before the first key. With a
    `gate` kernels run if the flag agrees. The scratch of few rows of 16 bits may be `in_float32`.
    """

    query: Float[Tensor, "batch heads rows head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    terms: Terms
    mask: Bool[Tensor, "batch keys"] | None
    scale: float
    causal: bool
    offset: int
    halo: tuple[int, int] = (0, 0)
    begun: Bool[Tensor, "batch"] | None = None
    gate: Gate | None = None
    in_float32: bool = False

    @property
    def scratch(self) -> torch.dtype:
        """Return the dtype of the scratch."""
        exact = self.wide or self.in_float32 or self.query.dtype == torch.float32
        return torch.float32 if exact else torch.float16

    @property
    def wide(self) -> bool:
        """Return whether the kernels are those of the wide way, which run if the flag is 1."""
        return self.gate is not None and self.gate.wide

    def programs(self, tiles: int, others: int) -> int:
        """Return the number of programs for some tiles, on the first axis of `others` programs."""
        return max(1, min(tiles, WIDE_PROGRAMS // others)) if self.wide else tiles

    def gated(self) -> dict[str, Any]:
        """Return the arguments of a kernel for the gate."""
        if self.gate is None:
            return {"gate": self.query, "GATED": -1}
        return {"gate": self.gate.flag, "GATED": int(self.gate.wide)}

    def part(self, band: Band) -> "Problem":
        """Return the problem of a band, with the index `band.shift` for the first row."""
        terms = self.terms
        if isinstance(terms, Features):
            terms = terms.part(band.keys)
        return self._replace(
            query=self.query[band.batch, :, band.rows],
            key=self.key[band.batch, :, band.keys],
            value=self.value[band.batch, :, band.keys],
            terms=terms,
            mask=None if self.mask is None else self.mask[band.batch, band.keys],
            begun=None if self.begun is None else self.begun[band.batch],
            offset=band.shift,
        )


def with_rows(x: Tensor) -> Tensor:
    """Return `x` with a contiguous last axis, for the kernels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def problem_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    causal: bool,
    offset: int,
    halo: Sequence[int] = (0, 0),
    begun: Tensor | None = None,
) -> Problem:
    """Return the problem of an operator's arguments, with contiguous rows."""
    return Problem(
        query=with_rows(query),
        key=with_rows(key),
        value=with_rows(value),
        terms=terms_of([table.contiguous() for table in tables]),
        mask=mask,
        scale=scale,
        causal=causal,
        offset=offset,
        halo=(halo[0], halo[1]),
        begun=begun,
    )


class Result(NamedTuple):
    """Output, log-sum-exp of every row, rounding error of the output, and a flag.

    A query without a visible key has output 0 and log-sum-exp -inf. `rest` is the rounding error,
    empty unless wanted. The flag is 1 if numbers left the range of 16 bits, and the result comes
    from wider numbers. Without numbers in 16 bits the flag is empty.
    """

    out: Float[Tensor, "batch heads rows value_dim"]
    lse: Float[Tensor, "batch heads rows"]
    rest: Float[Tensor, "..."]
    flag: Int[Tensor, "#1"]

    @classmethod
    def of(cls, problem: Problem, exact: bool) -> "Result":
        """Return room for the result of a problem, without a flag; float32 leaves no rest."""
        query = problem.query
        out = query.new_empty(*query.shape[:3], problem.value.shape[3])
        lse = query.new_empty(out.shape[:3], dtype=torch.float32)
        kept = exact and query.dtype != torch.float32
        rest = torch.empty_like(out) if kept else query.new_empty(0)
        return cls(out, lse, rest, query.new_empty(0, dtype=torch.int32))

    def at(self, band: Band) -> "Result":
        """Return the rows of a band."""
        place = (band.batch, slice(None), band.rows)
        rest = self.rest[place] if self.rest.numel() else self.rest
        return Result(self.out[place], self.lse[place], rest, self.flag)

    def silent(self) -> "Result":
        """Return the result without the flag, for kernels that set no flag."""
        return self._replace(flag=self.flag[:0])

    @property
    def exact(self) -> bool:
        """Return whether the result has room for the rounding error."""
        return self.rest.numel() > 0


class Sum(NamedTuple):
    """A gradient of a band: the sum over earlier bands, and room for the sum with the band.

    The first `summed` rows have an old sum, all others and rows of None have none.
    """

    old: Float[Tensor, "batch heads rows width"]
    new: Float[Tensor, "batch heads rows width"]
    summed: int | None


class Gradients(NamedTuple):
    """Room for dQ, dK and dV, and for their sums over several bands.

    The last band of a gradient stores the gradient, and earlier bands store a sum. All bands of
    some rows follow each other, and sums of dQ have room for the rows of a band alone.
    """

    query: Float[Tensor, "batch heads rows head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    sums: tuple[Tensor, ...]

    def of_queries(self, band: Band) -> Sum:
        """Return dQ of a band."""
        new, (elements, rows, _) = self.query[band.batch, :, band.rows], band.sizes
        if band.last and band.keys.start == 0:
            return Sum(new, new, None)
        old = self.sums[0][:elements, :, :rows]
        return Sum(old, new if band.last else old, None if band.keys.start == 0 else rows)

    def of_keys(self, band: Band) -> tuple[Sum, Sum]:
        """Return dK and dV of a band, of the last rows with those of keys that no row sees."""
        ends = band.rows.stop == self.query.shape[2]
        keys = slice(band.keys.start, None) if ends and band.last else band.keys
        place, summed = (band.batch, slice(None), keys), band.summed or None
        new = (self.key, self.value) if ends else self.sums[1:]
        key, value = (
            Sum(x[place], y[place], summed) for x, y in zip(self.sums[1:], new, strict=True)
        )
        return key, value
