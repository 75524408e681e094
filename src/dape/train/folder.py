"""The folder of a run: which recipe it belongs to, how far it is, and who made it."""

import json
import os
from pathlib import Path
from typing import Any

from dape.errors import UserError
from dape.train import config
from dape.train.config import Recipe

RECIPE, RECORD = "config.yaml", "run.json"


def check(recipe: Recipe, data_checksum: str) -> None:
    """Refuse a run folder in which this recipe, on this data, cannot go on.

    Raises:
        UserError: if it belongs to another recipe or other data, or is no run.
    """
    folder = recipe.folder
    remedy = "give this one another --name or --out, or delete that folder"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder} exists and is no run; {remedy}")
    changed = config.differences(config.read(folder / RECIPE, type(recipe)), recipe)
    if changed:
        raise UserError(f"{folder} holds a run with other settings: {', '.join(changed)}; {remedy}")
    found = record(folder).get("data", {}).get("checksum", data_checksum)
    if found != data_checksum:
        raise UserError(
            f"{folder} holds a run on other data: {recipe.data} has checksum {data_checksum[:12]}"
            f" (was {found[:12]}); {remedy}"
        )


def record(folder: Path) -> dict[str, Any]:
    """Return what `run.json` holds; nothing if there is none yet."""
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write(recipe: Recipe, entries: dict[str, Any]) -> None:
    """Write the recipe, and `run.json` with `entries` put over what it held."""
    recipe.folder.mkdir(parents=True, exist_ok=True)
    _replace(recipe.folder / RECIPE, config.write(recipe))
    text = json.dumps(record(recipe.folder) | entries, indent=2)
    _replace(recipe.folder / RECORD, text + "\n")


def _replace(file: Path, text: str) -> None:
    """Write a file that is whole at every moment."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
