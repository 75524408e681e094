"""From names of models to models for a measurement."""

from collections.abc import Sequence
from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dape.data.tokenizer import file_of_model
from dape.errors import UserError
from dape.evaluate.subject import Finetuned, InMemory, Model
from dape.evaluate.watch import SILENT, Watch, repeated
from dape.runs import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Given = str | Path | RunFolder | nn.Module


def open_models(
    given: Given | Sequence[Given],
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    partial_weights: bool = False,
    watch: Watch = SILENT,
) -> list[Model]:
    """Return the models, each once; `tokenizer` belongs to modules in memory.

    `watch` receives a note about repeated models.

    Raises:
        UserError: for an unknown name, or without any name.
    """
    each = [given] if isinstance(given, Given) else list(given)
    if not each:
        raise UserError("no model given: name a run or a model")
    models = [
        _in_memory(one, f"models[{place}]", tokenizer)
        if isinstance(one, nn.Module)
        else open_model(Path(one), partial_weights)
        for place, one in enumerate(each)
    ]
    found: dict[tuple[Path, Path], Model] = {}
    for model in models:
        # A name on the hub has the results of `runs/NAME`, possibly the folder of a run.
        paths = model.folder.path.resolve(), Path(model.source).resolve()
        if paths in found:
            watch.note(repeated(str(model.folder)))
        found.setdefault(paths, model)
    return list(found.values())


def note_unchecked(models: Sequence[Model], watch: Watch) -> None:
    """Note folders without a tokenizer, whose losses may be of other tokens than the model's."""
    for model in models:
        if Path(model.source).is_dir() and not file_of_model(model.source).is_file():
            watch.note(
                f"{model.source} has no tokenizer.json; make sure that the corpus has the tokens of"
                " the model, because only the size of the vocabulary is compared"
            )


def open_model(path: Path, partial_weights: bool = False) -> Model:
    """Return the run in a folder, or the model of this name on the Hugging Face hub.

    Raises:
        UserError: for an unknown model.
    """
    from dape.model.loading import load_config
    from dape.model.retrofit.storage import SETTINGS

    folder = RunFolder(path)
    # A record without a recipe is of a run whose recipe was lost.
    recipe = folder.read_recipe() if folder.exists or lexists(folder.record) else None
    if recipe and folder.is_retrofit:
        return _open_finetuned(folder, recipe, partial_weights)
    if (path / SETTINGS).is_file() and not partial_weights:
        raise UserError(
            f"{path} holds adapters of a retrofit; give the run of `dape retrofit`, or in Python "
            "call dape.load_adapters on the base model, and dape.evaluate.evaluate on that model"
        )
    for place in (folder.model, path):
        if (place / "config.json").is_file():
            config = load_config(str(place)).get_text_config()
            _check_config(place / "config.json", config, recipe or {})
            return Model(folder, str(place), config, recipe, partial_weights)
    if path.exists():
        remedy = (
            f"; `dape export {folder} --out DIR` makes a model of the latest checkpoint"
            if folder.checkpoints.is_dir()
            else "; give the folder of a run or of a model"
        )
        raise UserError(
            f"no model in {folder}: neither model/config.json of a finished `dape train` "
            f"nor config.json of a Hugging Face model{remedy}"
        )
    name = path.as_posix()
    config = load_config(name).get_text_config()
    return Model(RunFolder(Path("runs") / name), name, config, partial_weights=partial_weights)


def _check_config(file: Path, config: Any, recipe: dict[str, Any]) -> None:
    """Raise a `UserError` for a configuration of a model that its run's recipe contradicts."""
    training = {"train_length": (recipe.get("training") or {}).get("length")}
    asked = {**(recipe.get("model") or {}), **training, "backend": None}
    for name, value in asked.items():
        if value is not None and getattr(config, name, value) != value:
            raise UserError(
                f"{file} has {name}={getattr(config, name)!r}, the recipe of the run {value!r}; one"
                " of both is damaged or changed: put it back, or train again under another --name"
            )


def _open_finetuned(folder: RunFolder, recipe: dict[str, Any], partial_weights: bool) -> Finetuned:
    from dape.model.loading import load_config

    base = open_model(Path(recipe["model"]["base"]), partial_weights)
    mounted = recipe["model"]["adapter"] is not None
    if not (folder.adapters if mounted else folder.model).is_dir():
        raise UserError(f"{folder} is not finished; run the same `dape retrofit` again")
    source = base.source if mounted else str(folder.model)
    config = load_config(source, **recipe["model"]["config"])
    return Finetuned(folder, source, config, recipe, partial_weights, base)


def _in_memory(
    network: nn.Module, name: str, tokenizer: "PreTrainedTokenizerFast | None"
) -> InMemory:
    config = getattr(network, "config", None)
    if not hasattr(config, "get_text_config"):
        raise UserError(
            f"{name} is a {type(network).__name__} without the configuration of a causal language "
            "model of transformers; give a causal language model, or its folder"
        )
    return InMemory(
        RunFolder(Path(name)),
        f"{name} ({type(network).__name__})",
        config.get_text_config(),  # type: ignore[union-attr]
        network=network,
        own_tokenizer=tokenizer,
    )
