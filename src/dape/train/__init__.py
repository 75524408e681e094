"""From a recipe to a trained model, on Lightning Fabric.

`train` and `finetune` make a run, and `sweep` makes many recipes from a single recipe. A name is
imported at the first use, and reading a recipe does not import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dape.train.plan import cost, sweep
    from dape.train.recipe import Recipe, Retrofit
    from dape.train.run import finetune, train

_HOME = {
    "Recipe": "dape.train.recipe",
    "Retrofit": "dape.train.recipe",
    "cost": "dape.train.plan",
    "finetune": "dape.train.run",
    "sweep": "dape.train.plan",
    "train": "dape.train.run",
}

__all__ = ["Recipe", "Retrofit", "cost", "finetune", "sweep", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'dape.train' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
