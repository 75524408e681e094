"""The end of foreign models: tables of positions, learned or stored."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dape.errors import RankError, UserError, out_of_memory

# Models that follow a formula to any length and merely store it up to the number in this key.
STORED = {"codegen": "n_positions", "gptj": "n_positions", "mpt": "max_seq_len"}


class Refused(UserError):
    """A model does not take windows of a length; another length or model may go."""


class Tables(TorchFunctionMode):
    """Raise `Refused` where a model asks an embedding for a row it does not have.

    A GPU would not raise but end the process. That is how learned positions end, since
    `dape eval` checks the vocabulary before.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Check what `torch.nn.functional.embedding` is asked for; let all else pass."""
        if function is F.embedding:
            indices, table = args[:2]
            if indices.numel() and int(indices.max()) >= len(table):
                raise Refused(
                    f"its learned positions end: row {int(indices.max())} is asked of a table of "
                    f"{len(table)}"
                )
        return function(*args, **(kwargs or {}))


@contextmanager
def explained(length: int, windows: int) -> Iterator[None]:
    """Say in a line why a forward of so many windows fails.

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
            f"out of memory at length {length} with {windows} windows a forward; "
            "lower --batch-tokens or the longest of --lengths"
        ) from None
    except UserError as error:
        raise Refused(str(error)) from error
