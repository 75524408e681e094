"""Measurements of trained models: perplexity over length, retrieval, use of far text, lm-eval.

`evaluate`, `evaluate_retrieval`, `evaluate_context` and `evaluate_harness` are `dape eval`,
`dape eval retrieval`, `dape eval context` and `dape eval harness` as functions. A name is imported
at the first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dape.evaluate.context import ContextUse, evaluate_context
    from dape.evaluate.evaluation import evaluate
    from dape.evaluate.harness import evaluate_harness
    from dape.evaluate.record import Evaluation
    from dape.evaluate.retrieval import Retrieval, evaluate_retrieval

_HOME = {
    "ContextUse": "context",
    "Evaluation": "record",
    "Retrieval": "retrieval",
    "evaluate": "evaluation",
    "evaluate_context": "context",
    "evaluate_harness": "harness",
    "evaluate_retrieval": "retrieval",
}

__all__ = [
    "ContextUse",
    "Evaluation",
    "Retrieval",
    "evaluate",
    "evaluate_context",
    "evaluate_harness",
    "evaluate_retrieval",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'dape.evaluate' has no attribute {name!r}")
    return getattr(import_module(f"dape.evaluate.{_HOME[name]}"), name)
