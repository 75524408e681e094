"""One call as the kernels take it, a part of it, and its result."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dape.attention.fused.terms import Features, Terms


class Gate(NamedTuple):
    """A number on the device, 1 if a problem needs a scratch of four bytes, and for which it is.

    Both ways are started, and a kernel that is not wanted returns at once: the host need not wait
    to learn which it is.
    """

    flag: Int[Tensor, "1"]
    wide: bool


class Band(NamedTuple):
    """Some rows of some elements of the batch, and keys that they see, as the scratch holds them.

    `shift` is the index of the first row, counted from the first of the keys.
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


class Problem(NamedTuple):
    """One call: the arguments every kernel needs, checked and in their final layout.

    `mask` is true for keys that may be seen. `halo` is how many of the first and last keys have no
    weight, and `begun` is true for elements that have seen a key before the first: both are of
    `Taps` alone. With a `gate` the kernels run if it says so.
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
        """Return the arguments by which a kernel knows whether it is wanted."""
        if self.gate is None:
            return {"gate": self.query, "GATED": -1}
        return {"gate": self.gate.flag, "GATED": int(self.gate.wide)}

    def part(self, band: Band) -> "Problem":
        """Return the problem of a band alone, whose first row has the index `band.shift`."""
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


class Result(NamedTuple):
    """Output, log-sum-exp of each row, what rounding left of the output, and a flag.

    A query that sees no key has zeros and -inf. `rest` is empty if nobody asks for it. The flag is
    1 where numbers leave the range of 16 bits, and all was computed in a wider one; it is empty
    where nothing stands in 16 bits.
    """

    out: Float[Tensor, "batch heads rows value_dim"]
    lse: Float[Tensor, "batch heads rows"]
    rest: Float[Tensor, "..."]
    flag: Int[Tensor, "#1"]

    @classmethod
    def of(cls, problem: Problem, exact: bool) -> "Result":
        """Return room for the result of a problem, the flag empty; float32 leaves no rest."""
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
        """Return the same without a flag, for kernels that set none."""
        return self._replace(flag=self.flag[:0])

    @property
    def exact(self) -> bool:
        """Return whether there is room for what rounding leaves."""
        return self.rest.numel() > 0


class Gradients(NamedTuple):
    """Where dQ, dK and dV go; `add` if several bands add to them."""

    query: Float[Tensor, "batch heads rows head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    add: bool

    def at(self, band: Band) -> "Gradients":
        """Return those of a band, where it alone fills them with those of the keys nobody sees."""
        keys = band.keys if self.add else slice(None)
        return Gradients(
            self.query[band.batch, :, band.rows],
            self.key[band.batch, :, keys],
            self.value[band.batch, :, keys],
            self.add,
        )
