"""How an operator is registered with PyTorch.

Inductor keeps compiled graphs on disk, with the schema of every operator. A change of a schema
takes a new number in the name, because older graphs would call with old arguments.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dape.errors import UserError

LIBRARY = torch.library.Library("dape", "FRAGMENT")
PLAIN = Tensor, torch.nn.Parameter


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


def straight(operator: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return an operator that calls its `function` where the dispatcher would do nothing more.

    The dispatcher takes the host about 30 microseconds.
    """

    def call(*given: Any) -> Any:
        return (function if undisturbed(given) else operator)(*given)

    return call


def undisturbed(given: Iterable[Any]) -> bool:
    """Return whether nothing is to be differentiated, and no transform, mode or tracer watches."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    grad = torch.is_grad_enabled()
    for x in given:
        if isinstance(x, Tensor):
            if type(x) not in PLAIN or x.is_meta or (grad and x.requires_grad):
                return False
        elif isinstance(x, tuple | list) and not undisturbed(x):
            return False
    return True


def below_autograd(operator: Any, *given: Any) -> Any:
    """Return the results of an operator without gradients."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*given)


class _Final(torch.autograd.Function):
    """Gradients that depend on further tensors, and refuse to be differentiated."""

    @staticmethod
    def forward(_: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(*_: Any) -> NoReturn:
        raise UserError(
            "the fused kernels have first derivatives alone; give backend='chunked' for second ones"
        )


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backward pass whose gradients refuse to be differentiated.

    Gradients of PyTorch's `once_differentiable` are cut from the graph. For `torch.autograd.grad`
    and `torch.autograd.functional.hvp`, their derivatives are then zeros.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        tensors = [x for x in found if x is not None]
        sources = [x for x in (*ctx.saved_tensors, *grads) if x is not None]
        final = iter(_Final.apply(len(tensors), *tensors, *sources))
        return tuple(None if x is None else next(final) for x in found)

    return once
