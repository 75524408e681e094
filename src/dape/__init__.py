"""Data-adaptive positional encoding: encodings, exact attention and models that read further.

The public names are imported when first used, so that `import dape` costs nothing beyond Python.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dape.attention import attention
    from dape.errors import UserError
    from dape.model.configuration import DapeConfig
    from dape.model.modeling import DapeForCausalLM, DapeModel
    from dape.positions.adapter import DAPE
    from dape.positions.bias import ALiBi, Kerple, NoBias

__version__ = "0.1.0"

_HOME = {
    "ALiBi": "dape.positions.bias",
    "DAPE": "dape.positions.adapter",
    "DapeConfig": "dape.model.configuration",
    "DapeForCausalLM": "dape.model.modeling",
    "DapeModel": "dape.model.modeling",
    "Kerple": "dape.positions.bias",
    "NoBias": "dape.positions.bias",
    "UserError": "dape.errors",
    "attention": "dape.attention.operator",
}

__all__ = [
    "DAPE",
    "ALiBi",
    "DapeConfig",
    "DapeForCausalLM",
    "DapeModel",
    "Kerple",
    "NoBias",
    "UserError",
    "attention",
]


class _Package(ModuleType):
    """Keeps `dape.attention` the operator, which importing its subpackage would rebind."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "attention":
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import a public name from its home (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'dape' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*globals(), *_HOME])
