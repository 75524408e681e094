"""Answers that PyTorch's compiler takes as constants.

The import of this file loads the compiler, which takes seconds. Compiled code alone imports it.
"""

from collections.abc import Callable

import torch


@torch.compiler.assume_constant_result
def constant(question: Callable[[], str | None]) -> str | None:
    """Return the answer of a function that the compiler calls, and does not trace."""
    return question()
