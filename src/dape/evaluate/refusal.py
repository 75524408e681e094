"""Refusals of windows by a model, and failures of a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

from dape.errors import RankError, UserError, out_of_memory
from dape.text import counted


class Refused(UserError):
    """A refusal of windows of a length by a model; other lengths or models may work."""


@contextmanager
def explained(length: int, windows: int) -> Iterator[None]:
    """Turn a failure of a forward pass of `windows` windows into a one-line error.

    Raises:
        Refused: if the model itself raises a `UserError`.
        RankError: if memory runs out, of a GPU or of the machine.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise RankError(
            f"out of memory at length {length} with {counted(windows, 'window')} in a forward pass;"
            " lower --batch-tokens or the longest of --lengths"
        ) from None
    except UserError as error:
        raise Refused(str(error)) from error
