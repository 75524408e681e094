"""The interface of a mixer, with a problem and its terms."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from jaxtyping import Float
from torch import Tensor

from dape.attention.fused.problem import Band, Problem, Result
from dape.attention.fused.rows import Rows
from dape.attention.fused.sizes import PRECISION, WIDE_PRECISION, WIDE_PROGRAMS, padded
from dape.attention.fused.terms import Mixing

Kind = TypeVar("Kind", bound=Mixing)
# Programs that fill a large GPU a few times over, in order to even out short diagonals, and the
# fewest rows of a segment.
PROGRAMS, ROWS = 2048, 256


@dataclass(frozen=True, slots=True)
class Mixer(ABC, Generic[Kind]):
    """Kernels across heads for a problem and its terms."""

    problem: Problem
    terms: Kind

    def whole(self, found: Result) -> bool:
        """Fill a result and its flag by one kernel, if it serves the problem; return whether."""
        return False

    @property
    def static(self) -> Tensor | None:
        """Return C in float32 if logits of `mix` lack C: `[H, N]`, or `[3 H, N]`.

        The second form has C of keys from the third on, of the first, and of the second.
        """
        return None

    @abstractmethod
    def mix(self, x: Tensor, band: Band) -> Tensor:
        """Return logits of a band from scores X, which may be overwritten; -inf where unseen."""

    @abstractmethod
    def slots(self) -> Any:
        """Return room where programs sum the gradients of tables and weights."""

    @abstractmethod
    def mix_backward(
        self, x: Tensor, y: Tensor, band: Band, rows: Rows, slots: Any
    ) -> tuple[Tensor, Tensor]:
        """Return P and dA of a band from scores X and Y = dP - delta; add to the slots.

        X and Y may be overwritten. `rows` are the rows of the band.
        """

    @abstractmethod
    def gradients(self, slots: Any, unit: Float[Tensor, ""], into: Kind) -> None:
        """Fill the gradients of the terms from the slots, times `unit`."""

    def segments(self, batch: int, diagonals: int, rows: int) -> int:
        """Return into how many segments programs in Triton cut a diagonal."""
        programs = WIDE_PROGRAMS if self.problem.wide else PROGRAMS
        return max(1, min(16, rows // ROWS, programs // max(1, batch * diagonals)))

    def mask(self, x: Tensor, band: Band) -> Tensor:
        """Return the mask of a band, or `x` in place of a missing mask."""
        mask = self.problem.mask
        return x if mask is None else mask[band.batch, band.keys]

    def compiled(self) -> dict[str, Any]:
        """Return the compile-time arguments of every kernel: counts, padded, and switches."""
        units, heads = self.terms.weight_in.shape
        return {
            "H": heads, "D": units, "HEADS": padded(heads), "UNITS": padded(units),
            "CAUSAL": self.problem.causal, "MASKED": self.problem.mask is not None,
            "PRECISION": WIDE_PRECISION if self.problem.wide else PRECISION, **self.problem.gated(),
        }  # fmt: skip
