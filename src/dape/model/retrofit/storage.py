"""Adapters in a folder: `adapters.safetensors` and what `adapters.json` says of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from dape.errors import UserError
from dape.files import read_json, whole, write_json
from dape.model.retrofit.choice import PARTS, Choice, Factory
from dape.model.retrofit.mount import Mounted, retrofit

FORMAT = 1
TENSORS, SETTINGS = "adapters.safetensors", "adapters.json"


def write(
    folder: Path,
    config: PreTrainedConfig,
    choice: Choice,
    train: Sequence[str],
    state: Mapping[str, torch.Tensor],
) -> None:
    """Write tensors of adapters and of parts, and how they are mounted on the base of `config`."""
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


def load_adapters(
    model: PreTrainedModel,
    folder: str | Path,
    adapter: Factory | None = None,
    bias: Factory | None = None,
    backend: str = "auto",
) -> Mounted:
    """Mount what `Mounted.save` wrote on the base model that it was made for.

    `adapter` and `bias` are needed, and used, only where `retrofit` was given factories of the
    user's own. Parts that trained with the adapters get the values that they learned.

    Raises:
        UserError: for a folder without adapters, or adapters of another model.
    """
    folder = Path(folder)
    settings = read(folder)
    if settings["model_type"] != model.config.model_type:
        raise UserError(
            f"the adapters in {folder} are for a model of type {settings['model_type']!r} "
            f"({settings['base']}), and this is {model.config.model_type!r}"
        )
    given: dict[str, Factory | None] = {"adapter": adapter, "bias": bias}
    chosen = {place: chosen_for(place, settings, given[place], folder) for place in given}
    mounted = retrofit(
        model, **chosen, options=settings["options"], train=settings["train"], backend=backend
    )
    try:
        fill(mounted, load_file(folder / TENSORS), folder)
    except BaseException:
        mounted.unmount()
        raise
    return mounted


def chosen_for(place: str, settings: dict[str, Any], given: Factory | None, folder: Path) -> Any:
    """Return the name in the settings, or the factory that is given for a class without one."""
    name = settings[place]
    if name is None or name in PARTS[place]:
        return name
    if given is None:
        raise UserError(f"the {place} in {folder} is {name}, a class of your own: give {place}=")
    return given


def read(folder: Path) -> dict[str, Any]:
    """Return what `adapters.json` says; raise a `UserError` if there is none of this format."""
    file, again = folder / SETTINGS, "save the adapters again"
    if not file.is_file():
        raise UserError(f"no adapters in {folder}: it has no {SETTINGS}")
    settings = read_json(file, dict, again)
    if settings.get("format") != FORMAT:
        raise UserError(f"{file} is not of format {FORMAT}; {again}")
    return settings


@torch.no_grad()
def fill(mounted: Mounted, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Put saved tensors in place; raise a `UserError` if they are those of another model."""
    state = mounted.state()
    shapes, found = ({k: list(v.shape) for k, v in each.items()} for each in (state, tensors))
    if shapes != found:
        name = next(name for name in sorted(shapes | found) if shapes.get(name) != found.get(name))
        raise UserError(
            f"the adapters in {folder} do not fit this model: {name} is "
            f"{found.get(name, 'missing')} there, and {shapes.get(name, 'nothing')} here"
        )
    for name, tensor in state.items():
        tensor.copy_(tensors[name])
