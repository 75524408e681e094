"""Lengths to measure at, where nobody says at which."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dape.errors import UserError

if TYPE_CHECKING:
    from dape.evaluate.subject import Model

TIMES_TRAINED = 16


def default_lengths(models: Sequence["Model"]) -> tuple[int, ...]:
    """Return the shortest training length and its doublings, up to 16 times the longest."""
    known = [trained_at(model) for model in models]
    return tuple(doubled(min(known), TIMES_TRAINED * max(known)))


def doubled(first: int, last: int) -> list[int]:
    """Return `first` and its doublings up to `last`."""
    return [first << times for times in range(max(0, last // first).bit_length())]


def trained_at(model: "Model") -> int:
    """Return the training length of a model.

    Raises:
        UserError: if it does not say.
    """
    if model.train_length is None:
        raise UserError(
            f"{model.source} does not say at what length it was trained; give --lengths"
        )
    return model.train_length
