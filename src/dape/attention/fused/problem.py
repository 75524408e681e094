"""A call in the form for kernels, bands of a call, and the result."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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

    `shift` is the index of the first row, counted from the first key of the band.
    """

    batch: slice
    rows: slice
    keys: slice
    shift: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the numbers of elements, rows and keys."""
        batch, rows, keys = (part.stop - part.start for part in self[:3])
        return batch, rows, keys


class Problem(NamedTuple):
    """A call for kernels: arguments of every kernel, checked and in the final layout.

    `mask` is true for visible keys. `halo` and `begun` are for `Taps` alone: the numbers of first
    and last keys without weight, and elements with a visible key before the first key. With a
    `gate` kernels run if the flag agrees.
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

    @property
    def scratch(self) -> torch.dtype:
        """Return the dtype of the scratch."""
        wide = self.gate is not None and self.gate.wide
        return torch.float32 if wide or self.query.dtype == torch.float32 else torch.float16

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


class Gradients(NamedTuple):
    """Room for dQ, dK and dV; with `add` several bands add to dQ, dK and dV."""

    query: Float[Tensor, "batch heads rows head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    add: bool

    def at(self, band: Band) -> "Gradients":
        """Return the gradients of a band. Without `add` a band fills dK and dV of all keys."""
        keys = band.keys if self.add else slice(None)
        return Gradients(
            self.query[band.batch, :, band.rows],
            self.key[band.batch, :, keys],
            self.value[band.batch, :, keys],
            self.add,
        )
