"""Lengths to measure at, where nobody says at which."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dape.errors import UserError, check_whole

if TYPE_CHECKING:
    from dape.evaluate.subject import Model

TIMES_TRAINED = 16


def chosen_lengths(lengths: Sequence[int] | None, models: Sequence["Model"]) -> list[int]:
    """Return the lengths to measure at, ascending and each once; `default_lengths` by default.

    Raises:
        UserError: for a length that is no whole number of 1 or more.
    """
    for length in lengths or ():
        check_whole(length=length)
    return sorted(set(map(int, lengths or default_lengths(models))))


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
