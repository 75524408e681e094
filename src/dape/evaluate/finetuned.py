"""What `dape retrofit` leaves: a pretrained model with adapters, or with other weights."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dape.data.hub import fetch
from dape.errors import UserError
from dape.evaluate.runs import LEARNED_BY, Run, open_run

ADAPTERS = Path("adapters")


@dataclass(frozen=True, slots=True)
class Finetuned(Run):
    """A run that began with the model of another, `base`; it has a recipe."""

    base: Run

    @property
    def chosen(self) -> dict[str, Any]:
        """Return the recipe's choices for the model."""
        return self.recipe["model"]  # type: ignore[index]

    @property
    def scheme(self) -> str:
        """Return what the model was, and what was mounted in it or done to it."""
        mounted = "-".join(filter(None, (self.chosen["adapter"], self.chosen["bias"])))
        change = f"+ {mounted}" if self.chosen["adapter"] else "fine-tuned"
        return f"{getattr(self.config, 'scheme', self.config.model_type)} {change}"

    @property
    def train_length(self) -> int | None:
        """Return the length of the fine-tuning."""
        return self.recipe["training"]["length"]  # type: ignore[index]

    @property
    def settings(self) -> str | None:
        """Return a checksum of the recipe and of the base's settings, without the seeds of both."""
        learned = {name: self.recipe.get(name) for name in LEARNED_BY}  # type: ignore[union-attr]
        learned["model"] = {**self.chosen, "base": self.base.settings or self.base.source}
        return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:16]

    def load(self, device: torch.device, longest: int = 0) -> torch.nn.Module:
        """Return the model on the device, with the adapters mounted if there are any."""
        if self.chosen["adapter"] is None:
            return Run.load(self, device, longest)
        from transformers import AutoModelForCausalLM

        from dape.model.retrofit import load_adapters

        model = fetch(AutoModelForCausalLM.from_pretrained, self.source, config=self.config)
        load_adapters(model.to(device), self.folder / ADAPTERS, backend=self.chosen["backend"])
        return model.eval()


def open_finetuned(folder: Path, recipe: dict[str, Any]) -> Finetuned:
    """Return the run in a folder of `dape retrofit`.

    Raises:
        UserError: if it is not finished, or its base is gone.
    """
    from transformers import AutoConfig

    base = open_run(Path(recipe["model"]["base"]))
    source = str(folder / "model") if recipe["model"]["adapter"] is None else base.source
    if not (folder / ("model" if recipe["model"]["adapter"] is None else ADAPTERS)).is_dir():
        raise UserError(f"{folder} is not finished; give the same `dape retrofit` again")
    config = fetch(AutoConfig.from_pretrained, source, **recipe["model"]["config"])
    return Finetuned(folder, source, config, recipe, base)
