"""The turn of a rotation: as a formula, and on a GPU in a single kernel, forward and backward.

Without a compiler the formula takes eight kernels, and passes float32 numbers through memory. A
compiler puts the angles into the same kernel, and computes cosine and sine again for each head of
each sequence: on an H200, 0.29 ms for 32,768 tokens of 512 numbers. An operator is opaque to the
compiler, and gets cosines and sines from memory.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dape.device import has_triton
from dape.registered import below_autograd, register, straight

Rows = Float[Tensor, "batch heads length head_dim"]
Waves = Float[Tensor, "... length pairs"]

ROWS = 32  # of a program
SERVED = (torch.float16, torch.bfloat16, torch.float32)


def turn(x: Rows, cos: Waves, sin: Waves) -> Rows:
    """Return x with the leading pairs turned, scaled like cosine and sine."""
    compiled = torch.compiler.is_compiling()
    if not served(x, cos) or (compiled and better_read(x)):
        return formula(x, cos, sin)
    # `Turn` has rules for `vmap` and forward derivatives. A compiler reads no function with rules.
    turned: Tensor = operator(x, cos, sin, 1.0) if compiled else turned_by(x, cos, sin, 1.0)
    return turned


def served(x: Rows, cos: Waves) -> bool:
    """Return whether the kernel serves a call, where Triton is installed."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return x.is_cuda and x.dtype in SERVED and not cos.requires_grad and not tracing


def better_read(x: Rows) -> bool:
    """Return whether a compiler shall read the formula.

    An exporter shall, for machines without this package. The few numbers of a step of decoding go
    into a kernel that the host starts anyway. Transforms of `torch.func` know the formula.
    """
    # `is_exporting` is true in all compiled code of PyTorch 2.11.
    exporting = torch.compiler._is_exporting_flag
    return exporting or x.shape[2] == 1 or torch._C._are_functorch_transforms_active()


def formula(x: Rows, cos: Waves, sin: Waves) -> Rows:
    """Return the turned x, in float32 or wider, before rounding to the dtype of x."""
    pairs = cos.shape[-1]
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # all heads alike
    first, second, rest = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
    # `stack`, because `vmap` of `cat` fixes the length in a compilation for all lengths.
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -2).flatten(-2)
    return (torch.cat((turned, rest), -1) if rest.shape[-1] else turned).to(x.dtype)


class Turn(torch.autograd.Function):
    """The turn by the angles times a sign. The gradient is the turn by the opposite angles."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        """Return the turned x, with shape, dtype and strides of x."""
        turned: Tensor = below_autograd(operator, x, cos, sin, sign)
        return turned

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Any) -> None:
        """Keep the angles."""
        _, cos, sin, ctx.sign = inputs
        ctx.save_for_backward(cos, sin)
        ctx.save_for_forward(cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of x."""
        cos, sin = ctx.saved_tensors
        return Turn.apply(*gradients, cos, sin, -ctx.sign), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Tensor:
        """Return the change of the turned x along a change of x."""
        cos, sin = ctx.saved_tensors
        changed: Tensor = Turn.apply(tangent, cos, sin, ctx.sign)
        return changed

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
        """Return the turned x for every element of a further axis, as a larger batch."""
        *tensors, sign = given
        x, *waves = (
            each.expand(info.batch_size, *each.shape) if axis is None else each.movedim(axis, 0)
            for each, axis in zip(tensors, axes[:3], strict=True)
        )
        sizes = x.shape[:2]
        waves = [(each[:, None] if each.ndim == 3 else each) for each in waves]
        waves = [each.expand(*sizes, -1, -1).flatten(0, 1) for each in waves]
        return Turn.apply(x.flatten(0, 1), *waves, sign).unflatten(0, sizes), 0


def launch(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Return x turned by the angles times the sign, computed by the kernel if there is Triton."""
    if not has_triton():
        return like(x).copy_(formula(x, cos, sign * sin))
    import triton

    from dape.positions.turn_kernels import turn_kernel

    out = like(x)
    x = x if x.stride(3) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, length, width = x.shape
    pairs, rows = cos.shape[-1], batch * heads * length
    rest = width - 2 * pairs
    if rows:
        with torch.cuda.device_of(x):
            turn_kernel[(triton.cdiv(rows, ROWS),)](
                x, cos, sin, out, rows, heads, length, *x.stride()[:3], *out.stride()[:3],
                length * pairs if cos.numel() > length * pairs else 0, sign,
                width, pairs, triton.next_power_of_2(pairs),
                triton.next_power_of_2(rest) if rest else 0, ROWS,
            )  # fmt: skip
    return out


def like(x: Tensor, *_: Any) -> Tensor:
    """Return room for the turned x."""
    return torch.empty_like(x if x.stride(3) == 1 else x.contiguous())


operator = register(
    "turn_1(Tensor x, Tensor cos, Tensor sin, float sign) -> Tensor", launch, like, Turn.apply
)
turned_by = straight(Turn.apply, launch)
