"""What a call adds to its scores A: one of five kinds, each a type that holds its tables.

C is what the logits are where A = 0, U what the hidden units are there; W1 and W2 are the layers of
the adapter on the scores, and phi is a LeakyReLU. `naive` has the formula of each kind. Tables are
float32, in the order in which the operators of PyTorch take them. A gradient has the type of what
it is the gradient of.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

SLOPE = 0.01  # of the LeakyReLU


class Nothing(NamedTuple):
    """Nothing is added."""


class Static(NamedTuple):
    """A bias, C `[H, N]` over the distances 0..N-1."""

    static: Float[Tensor, "heads distances"]


class Mixed(NamedTuple):
    """Heads are mixed at each key, by tables over the distance: DAPE V1 and talking heads.

    C holds `W2 phi(U)`, and the gradient of U counts what U has by C. That of W2 does not.
    """

    static: Float[Tensor, "heads distances"]
    hidden: Float[Tensor, "distances hidden"]
    weight_in: Float[Tensor, "hidden heads"]
    weight_out: Float[Tensor, "heads hidden"]


class Features(NamedTuple):
    """Heads are mixed at each key, by tables over the features of FIRE, f = (1, relu(v x + c)).

    `x = psi[|i - j|] scale[max(i, j)]`. Without an adapter there are no hidden units.
    """

    static: Float[Tensor, "heads 1+features"]
    hidden: Float[Tensor, "1+features hidden"]
    weight_in: Float[Tensor, "hidden heads"]
    weight_out: Float[Tensor, "heads hidden"]
    psi: Float[Tensor, "distances"]
    scale: Float[Tensor, "indices"]
    weight: Float[Tensor, "features"]
    bias: Float[Tensor, "features"]

    def part(self, keys: slice) -> "Features":
        """Return the features with indices counted from the first of some keys."""
        return self._replace(scale=self.scale[keys.start :])


class Taps(NamedTuple):
    """Heads are mixed by convolutions along the keys, by tables over the distance: DAPE V2.

    The axes of units hold D for each tap. b1 stands apart from U, which a tap adds where it sees a
    key.
    """

    static: Float[Tensor, "heads distances"]
    hidden: Float[Tensor, "distances taps*hidden"]
    weight_in: Float[Tensor, "taps*hidden heads"]
    weight_out: Float[Tensor, "heads taps*hidden"]
    hidden_bias: Float[Tensor, "hidden"]

    @property
    def taps(self) -> int:
        """Return how many keys each layer sees at a time."""
        return len(self.weight_in) // len(self.hidden_bias)


Mixing = Mixed | Features | Taps
Terms = Nothing | Static | Mixing
_KINDS: dict[int, type[Terms]] = {
    len(kind._fields): kind for kind in (Nothing, Static, Mixed, Features, Taps)
}


def terms_of(tables: Sequence[Tensor]) -> Terms:
    """Return the terms of an operator's tables, whose number says of which kind they are."""
    return _KINDS[len(tables)](*tables)
