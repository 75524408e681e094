"""How an operator is registered with PyTorch.

Inductor keeps compiled graphs on disk, and they hold the schema of each operator. A change of a
schema takes a new number in the name: graphs of an older version would call with old arguments.
"""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("dape", "FRAGMENT")


def register(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    with_gradients: Callable[..., Any] | None = None,
) -> Any:
    """Return an operator; what `custom_op` puts around one costs several times as much host time.

    Args:
        schema: its name, arguments and results.
        function: computes it on every device.
        fake: returns what it returns, without numbers.
        with_gradients: the same as `function`, for arguments that may require gradients.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dape::{name}", fake, lib=LIBRARY)
    if with_gradients is not None:
        LIBRARY.impl(name, with_gradients, "Autograd")
    return getattr(torch.ops.dape, name).default


def below_autograd(operator: Any, *given: Any) -> Any:
    """Return what an operator computes, without gradients."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*given)
