"""Models of others with a table of positions, learned or stored."""

import inspect
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dape.device import device_of
from dape.errors import UserError
from dape.model.arguments import CACHE_NAMES

# Models with a formula for any length, stored in a table up to the number in this key.
_STORED = {
    **dict.fromkeys(("codegen", "ctrl", "gptj"), "n_positions"),
    "mpt": "max_seq_len",
}

# Models whose tables end in an error of PyTorch, before a row outside an embedding is read.
_ENDING = {**_STORED, "openai-gpt": "n_positions"}


def reaching(config: Any, longest: int) -> Any:
    """Return a configuration whose stored table of positions, if any, holds `longest` tokens."""
    key = _STORED.get(config.model_type)
    if key is None:
        return config
    config = deepcopy(config)
    setattr(config, key, max(longest, getattr(config, key)))
    return config


class Tables(TorchFunctionMode):
    """Raise a `UserError` where a model reads beyond a table of positions.

    A GPU would end the process instead. A row outside an embedding is a learned position, because
    callers check the vocabulary before.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._hooks = model, ExitStack()

    def __enter__(self) -> "Tables":
        """Look at the inputs of the model too."""
        hook = self._model.register_forward_pre_hook(_check_inputs, with_kwargs=True)
        self._hooks.callback(hook.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Look no longer."""
        super().__exit__(*error)
        self._hooks.close()

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


def _check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs, with the tokens in a cache, beyond the table of a model."""
    lengths = [
        each.shape[1]
        for each in (*args[:1], *map(kwargs.get, ("input_ids", "inputs_embeds", "attention_mask")))
        if isinstance(each, torch.Tensor)
    ]
    for cache in map(kwargs.get, CACHE_NAMES):
        if cache is not None and kwargs.get("attention_mask") is None:
            lengths = [int(cache.get_seq_length()) + length for length in lengths]
    _check_length(model, max(lengths))


def _check_length(model: nn.Module, length: int) -> None:
    config: Any = model.config
    key = _ENDING.get(config.model_type)
    most = getattr(config, key) if key else _learned(model)
    if most is not None and length > most:
        remedy = f"; load the model with {key}={length}" if config.model_type in _STORED else ""
        raise UserError(f"the table of positions ends after {most} tokens{remedy}")


def _learned(model: nn.Module) -> int | None:
    """Return the tokens of a table as of BERT or RoBERTa, None for other models.

    RoBERTa counts from the row after the padding.
    """
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if type(table) is nn.Embedding:
            return len(table.weight) - (0 if table.padding_idx is None else table.padding_idx + 1)
    return None


@torch.inference_mode()
def check_reach(model: nn.Module, length: int) -> None:
    """Refuse a training beyond the table of a model; a model that takes no positions has none.

    Raises:
        UserError: naming the length of the training.
    """
    place = torch.tensor([[length - 1]], device=device_of(model, torch.device("cpu")))
    try:
        _check_length(model, length)
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return
        with Tables(model):
            model(input_ids=torch.zeros_like(place), position_ids=place, use_cache=False)
    except UserError as error:
        raise UserError(f"training.length={length}: {error}; take a shorter length") from None
