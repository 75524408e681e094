"""The classes of this model, from the package `dape` (`pip install .` in a clone)."""

from dape import DapeConfig, DapeForCausalLM, DapeForSequenceClassification, DapeModel

__all__ = ["DapeConfig", "DapeForCausalLM", "DapeForSequenceClassification", "DapeModel"]
