"""DAPE in pretrained models of transformers."""

from dape.model.retrofit.mount import Mounted, retrofit, set_trainable
from dape.model.retrofit.storage import load_adapters

__all__ = ["Mounted", "load_adapters", "retrofit", "set_trainable"]
