"""DAPE in pretrained models of transformers."""

from dape.model.retrofit.loading import load_adapters
from dape.model.retrofit.mount import Mounted, retrofit, set_trainable

__all__ = ["Mounted", "load_adapters", "retrofit", "set_trainable"]
