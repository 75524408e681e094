"""Local and anti-local heads, named by numbers.

Zheng et al., 2024 (Figure 1, appendix I) call a head anti-local, by eye, if f favours far keys. The
numbers of this module are our own: the density of positive weight on far and on near keys.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dape.errors import UserError
from dape.evaluate.capture import Row
from dape.strict import Number

DENSER = 2.0  # least ratio of densities for a head named local or anti-local


@dataclass(frozen=True, slots=True)
class Head:
    """A head on near and far keys; a key is far at the distance `LearnedRows.far` or more.

    Positive weight is the part of a row above the mean over the keys, because a softmax does not
    see a constant. A number is None for a constant row.

    Attributes:
        head: number of the head, counted from 0.
        kind: `anti-local` if the positive weight of B + f is `DENSER` times as dense on far keys as
            on near keys, `local` if the reverse holds, otherwise `even`.
        positive_far: fraction of the positive weight of B + f (of f without residual) on far keys.
        change_far: fraction of the positive weight of f on far keys.
        attention_far: fraction of the attention on far keys.
        centre: mean distance of the attention, in tokens.
        with_scores: correlation of f with A over the keys.
        with_bias: correlation of f with B over the keys.
    """

    head: int
    kind: str
    positive_far: float | None
    change_far: float | None
    attention_far: Number
    centre: Number
    with_scores: float | None
    with_bias: float | None


def describe(row: Row, far: int) -> list[Head]:
    """Return the numbers of all heads of a row; keys at a distance of `far` or more are far.

    Raises:
        UserError: if none, or all, of the keys are far.
    """
    keys = row.scores.shape[1]
    if not 0 < far < keys:
        raise UserError(
            f"far={far} must be from 1 to {keys - 1}: some of {keys} keys near, some far"
        )
    distance = np.arange(keys)[::-1]
    parts = _varying(row)
    shift, change = parts["shift"], parts["change"]
    found = []
    for head, weights in enumerate(row.weights):
        positive = _fraction_far(shift[head], far)
        found.append(
            Head(
                head=head,
                kind=_kind_of(positive, 1 - far / keys),
                positive_far=positive,
                change_far=_fraction_far(change[head], far),
                attention_far=float(weights[distance >= far].sum()),
                centre=float(weights @ distance),
                with_scores=_correlation(change[head], parts["scores"][head]),
                with_bias=_correlation(change[head], parts["bias"][head]),
            )
        )
    return found


def _varying(row: Row) -> dict[str, Float[np.ndarray, "heads keys"]]:
    """Return A, B, f and B + f, centred over the keys; zeros where rows vary by rounding only."""
    found = {}
    for name in ("scores", "bias", "change", "shift"):
        values = getattr(row, name).astype(np.float64)
        centred = values - values.mean(axis=1, keepdims=True)
        found[name] = np.where(np.ptp(values, axis=1, keepdims=True) > row.rounding, centred, 0.0)
    return found


def _fraction_far(centred: Float[np.ndarray, " keys"], far: int) -> float | None:
    """Return the fraction of the positive weight `far` tokens or more before the last key."""
    positive = np.maximum(centred, 0)
    return float(positive[:-far].sum() / positive.sum()) if positive.any() else None


def _kind_of(fraction: float | None, keys_far: float) -> str:
    """Return the kind of a head with a fraction of positive weight on a fraction of the keys."""
    if fraction is None:
        return "even"
    far, near = fraction * (1 - keys_far), (1 - fraction) * keys_far  # densities, but for a factor
    return "anti-local" if far >= DENSER * near else "local" if near >= DENSER * far else "even"


def _correlation(x: Float[np.ndarray, " keys"], y: Float[np.ndarray, " keys"]) -> float | None:
    """Return Pearson's correlation of two centred rows, None for a constant row."""
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else None
