"""Terms: the tables and weights that a call adds to its scores A, a type for every kind.

At A = 0 the logits are C and the hidden units U. W1 and W2 are the layers of the adapter on the
scores, and phi is a LeakyReLU. `naive` has the formula of every kind. Tables are float32, in the
order of the operators' arguments. Gradients of terms are terms too.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

SLOPE = 0.01  # of the LeakyReLU


class Nothing(NamedTuple):
    """Nothing is added."""


class Static(NamedTuple):
    """A bias, C `[H, N]` over the distances 0..N-1.

    A bias of few learnable parameters has the derivatives of C by the parameters too. The backward
    pass then returns the gradient of the parameters alone.
    """

    static: Float[Tensor, "heads distances"]
    jacobian: Float[Tensor, "parameters heads distances"] | None = None
    parameters: Float[Tensor, "parameters heads"] | None = None


class Mixed(NamedTuple):
    """DAPE V1 and talking heads: heads mixed at every key, by tables over the distance.

    C holds `W2 phi(U)`. The gradient of U counts the way through C. The gradient of W2 does not.
    """

    static: Float[Tensor, "heads distances"]
    hidden: Float[Tensor, "distances hidden"]
    weight_in: Float[Tensor, "hidden heads"]
    weight_out: Float[Tensor, "heads hidden"]


class Features(NamedTuple):
    """FIRE: heads mixed at every key, by tables over features f = (1, relu(v x + c)).

    `x = psi[|i - j|] scale[max(i, j)]`. Without an adapter D = 0.
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
    """DAPE V2: heads mixed by convolutions along the keys, by tables over the distance.

    Axes of hidden units hold D for every tap. A tap adds U only at a visible key, while b1 counts
    everywhere, and is therefore no part of U.
    """

    static: Float[Tensor, "heads distances"]
    hidden: Float[Tensor, "distances taps*hidden"]
    weight_in: Float[Tensor, "taps*hidden heads"]
    weight_out: Float[Tensor, "heads taps*hidden"]
    hidden_bias: Float[Tensor, "hidden"]

    @property
    def taps(self) -> int:
        """Return the kernel size of the convolutions."""
        return len(self.weight_in) // len(self.hidden_bias)


Mixing = Mixed | Features | Taps
Terms = Nothing | Static | Mixing
_KINDS: dict[int, type[Terms]] = {
    len(kind._fields): kind for kind in (Nothing, Static, Mixed, Features, Taps)
} | {1: Static}


def terms_of(tables: Sequence[Tensor]) -> Terms:
    """Return the terms of an operator's tables. The number of tables decides the kind."""
    return _KINDS[len(tables)](*tables)


def mixes(tables: Sequence[Tensor]) -> bool:
    """Return whether an operator's tables are those of `Mixing`."""
    return not issubclass(_KINDS[len(tables)], Nothing | Static)


def learned(tables: Sequence[Tensor], learns: bool) -> Sequence[Tensor]:
    """Return the tables with gradients: without mixing the last alone, and only if asked for."""
    if mixes(tables):
        return tables
    return tables[-1:] if learns else []
