"""Models of others with a table of positions, learned or stored."""

import inspect
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dape.device import device_of
from dape.errors import UserError

# Models with a formula for any length, stored in a table up to the number in this key.
_STORED = {
    **dict.fromkeys(("codegen", "ctrl", "gptj"), "n_positions"),
    "mpt": "max_seq_len",
}


def reaching(config: Any, longest: int) -> Any:
    """Return a configuration whose stored table of positions, if any, holds `longest` tokens."""
    key = _STORED.get(config.model_type)
    if key is None:
        return config
    config = deepcopy(config)
    setattr(config, key, max(longest, getattr(config, key)))
    return config


class Tables(TorchFunctionMode):
    """Raise a `UserError` where a model reads a row outside an embedding.

    A GPU would end the process instead. The row is a learned position, because callers check the
    vocabulary before.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Check the indices of `torch.nn.functional.embedding`; other functions pass."""
        if function is F.embedding:
            indices, table = args[:2]
            if indices.numel() and int(indices.max()) >= len(table):
                raise UserError(
                    f"no learned position for row {int(indices.max())}: the table has "
                    f"{len(table)} rows"
                )
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def check_reach(model: nn.Module, length: int) -> None:
    """Refuse a training beyond the table of a model; a model that takes no positions has none.

    Raises:
        UserError: naming the length of the training.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return
    place = torch.tensor([[length - 1]], device=device_of(model, torch.device("cpu")))
    try:
        with Tables():
            model(input_ids=torch.zeros_like(place), position_ids=place, use_cache=False)
    except UserError as error:
        raise UserError(f"training.length={length}: {error}; take a shorter length") from None
