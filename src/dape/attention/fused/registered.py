"""How an operator is registered with PyTorch.

Inductor keeps compiled graphs on disk, with the schema of every operator. A change of a schema
takes a new number in the name, because older graphs would call with old arguments.
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
    """Return an operator, at a fraction of the host time of `torch.library.custom_op`.

    Args:
        schema: name, arguments and results.
        function: computes the results on every device.
        fake: returns results of equal shape and dtype, without numbers.
        with_gradients: `function` for arguments with gradients.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dape::{name}", fake, lib=LIBRARY)
    if with_gradients is not None:
        LIBRARY.impl(name, with_gradients, "Autograd")
    return getattr(torch.ops.dape, name).default


def below_autograd(operator: Any, *given: Any) -> Any:
    """Return the results of an operator without gradients."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*given)
