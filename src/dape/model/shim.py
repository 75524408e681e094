"""The classes of this model: they live in the package `dape` (`pip install .` in a clone of it)."""

from dape import DapeConfig, DapeForCausalLM, DapeForSequenceClassification, DapeModel

__all__ = ["DapeConfig", "DapeForCausalLM", "DapeForSequenceClassification", "DapeModel"]
