"""Lengths to measure at, given or by default."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dape.errors import UserError, check_whole

if TYPE_CHECKING:
    from dape.evaluate.subject import Model

TIMES_TRAINED = 16


def chosen_lengths(lengths: Sequence[int] | None, models: Sequence["Model"]) -> list[int]:
    """Return the lengths to measure at, ascending, without repetition; default `default_lengths`.

    Raises:
        UserError: for a length that is not a whole number of 1 or more.
    """
    for length in lengths or ():
        check_whole(length=length)
    return sorted(set(map(int, lengths or default_lengths(models))))


def default_lengths(models: Sequence["Model"]) -> tuple[int, ...]:
    """Return the shortest training length, doubled up to 16 times the longest training length."""
    known = [trained_at(model) for model in models]
    return tuple(doubled(min(known), TIMES_TRAINED * max(known)))


def doubled(first: int, last: int) -> list[int]:
    """Return `first`, doubled up to `last`."""
    return [first << times for times in range(max(0, last // first).bit_length())]


def trained_at(model: "Model") -> int:
    """Return the training length of a model.

    Raises:
        UserError: for a model without a training length.
    """
    if model.train_length is None:
        raise UserError(f"{model.source} states no training length; give --lengths")
    return model.train_length
