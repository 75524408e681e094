"""Adapters in a folder: `adapters.safetensors`, with settings in `adapters.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.configuration_utils import PreTrainedConfig

from dape.errors import UserError
from dape.files import read_json, whole, write_json
from dape.model.retrofit.choice import Choice
from dape.strict import check_keys

FORMAT = 1
TENSORS, SETTINGS = "adapters.safetensors", "adapters.json"
_KEYS = {
    **dict.fromkeys(("model_type", "base", "adapter"), str),
    "bias": str | None,
    "options": dict[str, Any],
    "train": list[str],
}


def write(
    folder: Path,
    config: PreTrainedConfig,
    choice: Choice,
    train: Sequence[str],
    state: Mapping[str, torch.Tensor],
) -> None:
    """Write tensors of adapters and of parts, and the settings of the mount on `config`."""
    settings = {
        "format": FORMAT,
        "model_type": config.model_type,
        "base": config.name_or_path,
        **choice.names(),
        "train": list(train),
    }
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    with whole(folder / TENSORS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    write_json(folder / SETTINGS, settings)


def read(folder: Path) -> dict[str, Any]:
    """Return the settings in `adapters.json`; raise a `UserError` for a missing or foreign file."""
    file, again = folder / SETTINGS, "save the adapters again"
    if not file.is_file():
        raise UserError(f"no adapters in {folder}: {SETTINGS} is missing")
    return read_json(file, _checked, again)


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    if settings.get("format") != FORMAT:
        raise UserError(f"not of format {FORMAT}")
    check_keys(settings, _KEYS)
    return settings
