"""The logits of every kind of terms from scores, in plain PyTorch: the truth for tests of mixers.

A band has scores X `[B, H, R, K]` of rows with indices i and of keys with indices j.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import leaky_relu, pad, relu

from dape.attention.fused.terms import SLOPE, Features, Mixed, Static, Taps, Terms


def logits(
    terms: Terms,
    scores: Float[Tensor, "batch heads rows keys"],
    rows: Int[Tensor, "rows"],
    keys: Int[Tensor, "keys"],
    seen: Bool[Tensor, "#batch 1 rows keys"],
) -> Float[Tensor, "batch heads rows keys"]:
    """Return the logits of visible keys, -inf elsewhere."""
    distances = (rows[:, None] - keys).abs()
    scores = scores.masked_fill(~seen, 0)
    match terms:
        case Static():
            scores = scores + terms.static[:, distances]
        case Mixed():
            u = terms.hidden[distances]
            risen = phi(across(terms.weight_in, scores) + u) - phi(u)
            scores = scores + terms.static[:, distances] + _heads_of(risen @ terms.weight_out.t())
        case Features():
            x = terms.psi[distances] * terms.scale[torch.maximum(rows[:, None], keys)]
            f = relu(x[..., None] * terms.weight + terms.bias)
            f = torch.cat((torch.ones_like(x)[..., None], f), dim=-1)
            hidden = phi(across(terms.weight_in, scores) + f @ terms.hidden)
            scores = scores + _heads_of(hidden @ terms.weight_out.t() + f @ terms.static.t())
        case Taps():
            scores = (
                scores + terms.static[:, distances] + _convolved(terms, scores, distances, seen)
            )
    return scores.masked_fill(~seen, -torch.inf)


def _convolved(
    terms: Taps,
    scores: Float[Tensor, "batch heads rows keys"],
    distances: Int[Tensor, "rows keys"],
    seen: Bool[Tensor, "#batch 1 rows keys"],
) -> Float[Tensor, "batch heads rows keys"]:
    """Return `sum_t W2_t Z[j + t - r]` for `Z[c] = phi(b1 + sum_t (W1_t X[c + t - r] + U_t))`.

    r = k // 2. Columns c of hidden units begin at the first key that the mask shows, and end r past
    the index of the row. A tap adds only at a visible key.
    """
    taps, units, reach = terms.taps, len(terms.hidden_bias), terms.taps // 2
    batch, _, rows, keys = scores.shape
    shown = seen.movedim(1, -1)
    added = (across(terms.weight_in, scores) + terms.hidden[distances]) * shown
    z = terms.hidden_bias.expand(batch, rows, keys + reach, units)
    for tap, of_tap in enumerate(added.split(units, dim=3)):
        shifted = pad(of_tap, (0, 0, 2 * reach, 2 * reach))  # the key c + t - r meets the column c
        z = z + shifted[:, :, tap + reach :][:, :, : keys + reach]
    begun = pad(shown.any(1)[:, None], (0, 0, 0, reach)).cumsum(2) > 0
    windows = pad(phi(z) * begun, (0, 0, reach, 0)).unfold(2, taps, 1)[:, :, :keys]
    return torch.einsum("brkut,htu->bhrk", windows, terms.weight_out.unflatten(1, (taps, units)))


def phi(x: Tensor) -> Tensor:
    """Return the LeakyReLU of the adapters."""
    return leaky_relu(x, SLOPE)


def across(
    layer: Float[Tensor, "units heads"], x: Float[Tensor, "batch heads rows keys"]
) -> Float[Tensor, "batch rows keys units"]:
    """Return a layer across heads."""
    return torch.einsum("uh,bhrk->brku", layer, x)


def _heads_of(x: Float[Tensor, "batch rows keys heads"]) -> Float[Tensor, "batch heads rows keys"]:
    """Return heads on the second axis."""
    return x.movedim(-1, 1)
