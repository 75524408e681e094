"""Length limits of foreign models: tables of positions, learned or stored."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dape.errors import RankError, UserError, out_of_memory

# Models with a formula for any length, stored in a table up to the number in this key.
STORED = {
    **dict.fromkeys(("codegen", "ctrl", "gptj"), "n_positions"),
    "mpt": "max_seq_len",
}


class Refused(UserError):
    """A refusal of windows of a length by a model; other lengths or models may work."""


class Tables(TorchFunctionMode):
    """Raise `Refused` where a model reads a row outside an embedding.

    A GPU would end the process instead. The row is a learned position, because `dape eval` checks
    the vocabulary before.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Check the indices of `torch.nn.functional.embedding`; other functions pass."""
        if function is F.embedding:
            indices, table = args[:2]
            if indices.numel() and int(indices.max()) >= len(table):
                raise Refused(
                    f"no learned position for row {int(indices.max())}: the table has "
                    f"{len(table)} rows"
                )
        return function(*args, **(kwargs or {}))


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
            f"out of memory at length {length} with {windows} windows in a forward pass; "
            "lower --batch-tokens or the longest of --lengths"
        ) from None
    except UserError as error:
        raise Refused(str(error)) from error
