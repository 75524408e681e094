"""Adapters from a folder, mounted on the base model."""

from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from dape.errors import UserError
from dape.files import read_tensors
from dape.model.retrofit.choice import PARTS, Factory, name_of, part_of
from dape.model.retrofit.mount import Mounted, retrofit, servable
from dape.model.retrofit.storage import TENSORS, read


def load_adapters(
    model: PreTrainedModel,
    folder: str | Path,
    adapter: Factory | None = None,
    bias: Factory | None = None,
    backend: str = "auto",
) -> Mounted:
    """Mount adapters written by `Mounted.save` on the base model.

    Parts of the model trained with the adapters get the trained values.

    Args:
        model: the base model.
        folder: folder with `adapters.safetensors` and `adapters.json`.
        adapter: the factory given to `retrofit`, needed only for a class of your own.
        bias: the factory given to `retrofit`, needed only for a class of your own.
        backend: backend of attention, as in `dape.attention`.

    Returns:
        A handle to save and unmount the adapters.

    Raises:
        UserError: for an unsupported model, a folder without adapters, adapters of another model,
            or another adapter or bias than in the folder.
    """
    model, folder = servable(model), Path(folder)
    settings = read(folder)
    if settings["model_type"] != model.config.model_type:
        raise UserError(
            f"the adapters in {folder} are for a model of type {settings['model_type']!r} "
            f"({settings['base']}), and the model is of type {model.config.model_type!r}"
        )
    given: dict[str, Factory | None] = {"adapter": adapter, "bias": bias}
    chosen = {place: _chosen(place, settings, given[place], folder) for place in given}
    mounted = retrofit(
        model, **chosen, options=settings["options"], train=settings["train"], backend=backend
    )
    try:
        _fill(mounted, read_tensors(folder / TENSORS, "save the adapters again"), folder)
    except BaseException:
        mounted.unmount()
        raise
    return mounted


def _chosen(place: str, settings: dict[str, Any], given: Factory | None, folder: Path) -> Any:
    """Return the given factory, or the name in the settings."""
    name, options = settings[place], settings["options"].get(place, {})
    known = name is None or name in PARTS[place]
    if given is None:
        if not known:
            raise UserError(
                f"the {place} in {folder} is {name}, a class of your own: give {place}="
            )
        return name
    part = part_of(place, given)
    if name_of(place, part) != name or not part.options.items() <= options.items():
        found = ", ".join((str(name), *(f"{key}={value!r}" for key, value in options.items())))
        remedy = "leave it out" if known else f"give the class {name}"
        raise UserError(f"{place}={given!r}: the {place} in {folder} is {found}; {remedy}")
    return given


@torch.no_grad()
def _fill(mounted: Mounted, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Load saved tensors; raise a `UserError` for tensors of another model."""
    state = mounted.state()
    shapes, found = ({k: list(v.shape) for k, v in each.items()} for each in (state, tensors))
    if shapes != found:
        name = next(name for name in sorted(shapes | found) if shapes.get(name) != found.get(name))
        raise UserError(
            f"the adapters in {folder} do not fit the model: {name} is "
            f"{found.get(name, 'missing')} in the folder, "
            f"{shapes.get(name, 'missing')} in the model"
        )
    for name, tensor in state.items():
        tensor.copy_(tensors[name])
