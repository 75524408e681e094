"""Data-adaptive positional encoding: encodings, exact attention, models for transformers.

A public name is imported at the first use. `import dape` alone imports neither PyTorch nor
transformers.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dape.model.announce import announce

if TYPE_CHECKING:
    from dape.attention import attention
    from dape.errors import UserError
    from dape.model.configuration import DapeConfig
    from dape.model.huggingface import DapeForSequenceClassification
    from dape.model.modeling import DapeForCausalLM, DapeModel
    from dape.model.retrofit import load_adapters, retrofit
    from dape.positions.absolute import Learned, Sinusoidal
    from dape.positions.adapter import DAPE, CoPE, TalkingHeads, TransformerXL
    from dape.positions.bias import FIRE, T5, ALiBi, Kerple, KerplePower, NoBias, Sandwich
    from dape.positions.rotary import (
        NTK,
        DynamicNTK,
        Llama3,
        PositionInterpolation,
        RandomizedRoPE,
        RoPE,
        XPos,
        YaRN,
    )

__version__ = "0.1.0"

_HOME = {
    "ALiBi": "dape.positions.bias",
    "CoPE": "dape.positions.adapter",
    "DAPE": "dape.positions.adapter",
    "DapeConfig": "dape.model.configuration",
    "DapeForCausalLM": "dape.model.modeling",
    "DapeForSequenceClassification": "dape.model.huggingface",
    "DapeModel": "dape.model.modeling",
    "DynamicNTK": "dape.positions.rotary",
    "FIRE": "dape.positions.bias",
    "Kerple": "dape.positions.bias",
    "KerplePower": "dape.positions.bias",
    "Learned": "dape.positions.absolute",
    "Llama3": "dape.positions.rotary",
    "NTK": "dape.positions.rotary",
    "NoBias": "dape.positions.bias",
    "PositionInterpolation": "dape.positions.rotary",
    "RandomizedRoPE": "dape.positions.rotary",
    "RoPE": "dape.positions.rotary",
    "Sandwich": "dape.positions.bias",
    "Sinusoidal": "dape.positions.absolute",
    "T5": "dape.positions.bias",
    "TalkingHeads": "dape.positions.adapter",
    "TransformerXL": "dape.positions.adapter",
    "UserError": "dape.errors",
    "XPos": "dape.positions.rotary",
    "YaRN": "dape.positions.rotary",
    "attention": "dape.attention.operator",
    "load_adapters": "dape.model.retrofit",
    "retrofit": "dape.model.retrofit",
}

_PACKAGES = ("evaluate", "train")

__all__ = [
    "DAPE",
    "FIRE",
    "NTK",
    "T5",
    "ALiBi",
    "CoPE",
    "DapeConfig",
    "DapeForCausalLM",
    "DapeForSequenceClassification",
    "DapeModel",
    "DynamicNTK",
    "Kerple",
    "KerplePower",
    "Learned",
    "Llama3",
    "NoBias",
    "PositionInterpolation",
    "RandomizedRoPE",
    "RoPE",
    "Sandwich",
    "Sinusoidal",
    "TalkingHeads",
    "TransformerXL",
    "UserError",
    "XPos",
    "YaRN",
    "attention",
    "load_adapters",
    "retrofit",
]


class _Package(ModuleType):
    """Keeps `dape.attention` the operator. An import of the subpackage would rebind the name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "attention":
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
announce()


def __getattr__(name: str) -> Any:
    """Import a public name from its module, or a package of public functions (PEP 562)."""
    if name in _PACKAGES:
        return import_module(f"dape.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'dape' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted({*globals(), *_HOME, *_PACKAGES})
