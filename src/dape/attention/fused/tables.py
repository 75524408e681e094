r"""A bias and an adapter as tables over the distance, by ordinary differentiable code.

If B depends on the distance alone, then so does all that DAPE makes of it. With W1 = [W1a, W1b] on
[A; B] and tables `U = W1b B + b1` and `C = B + b2 + W2 phi(U)`, the logits are

    A + C + W2 (phi(W1a A + U) - phi(U)).

C is what they are where A = 0, and stays in float32: a bias of 1e5 is as exact as elsewhere. What
the kernels compute in 16 bits is no larger than the scores make it, whatever the bias. They take
the tables and give their gradients; what stands behind them is autograd's. That of U is the whole:
the kernels know how U enters C.

FIRE depends on the row too, but is linear in features `f = (1, relu(v x + c))` of the one number
`x = psi(|i - j|) / psi(max(i, j, L))`: the logits are `A + C f + W2 phi(W1a A + U f)`, with tables
over the features instead of the distances, made by the same code. x itself is an entry of a table
over the distance times one of a table over the later slot.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from dape.positions.adapter import DAPE, TalkingHeads
from dape.positions.bias import FIRE

SLOPE = 0.01  # of the kernels' LeakyReLU


def hidden_units(adapter: nn.Module | None) -> int:
    """Return how many hidden units the tables of an adapter have, 0 without."""
    if isinstance(adapter, TalkingHeads):
        return 2 * adapter.num_heads
    return adapter.hidden if isinstance(adapter, DAPE) else 0


def obstacle(bias: nn.Module | None, adapter: nn.Module | None) -> str | None:
    """Return why a bias and an adapter are no tables, or None if they are."""
    if not (bias is None or type(bias) is FIRE or getattr(bias, "relative", False)):
        return f"{type(bias).__name__} depends on more than the distance"
    if adapter is not None and type(adapter) not in (DAPE, TalkingHeads):
        return f"the fused kernels do not know the adapter {type(adapter).__name__}"
    if type(bias) is FIRE and isinstance(adapter, DAPE) and adapter.kernel_size > 1:
        return (
            f"behind FIRE they mix heads at each key alone, and kernel_size={adapter.kernel_size}"
        )
    return None


def tables(
    bias: nn.Module | None,
    adapter: nn.Module | None,
    num_heads: int,
    count: int,
    device: torch.device,
    key_offset: int = 0,
) -> tuple[Tensor, ...]:
    """Return C `[H, N]`, U `[N, D]`, W1a `[D, H]` and W2 `[H, D]` over the distances 0..N-1.

    In float32. For DAPE V2 axes of units hold D for each tap, and b1 comes last. Where no scores
    are mixed there is C alone, and nothing without a bias. For FIRE they are over its features, and
    what makes the features follows. C is without `W2 phi(U)` for both, as U is no table of its own.
    """
    with torch.autocast(device.type, enabled=False):
        if isinstance(bias, FIRE):
            return fire_tables(bias, adapter, count, device, key_offset)
        values = None
        if bias is not None:
            distances = torch.arange(count, device=device)
            values = bias(distances, distances[:1])[..., 0].float()
        if not isinstance(adapter, DAPE | TalkingHeads):
            return () if values is None else (values,)
        if values is None:
            values = torch.zeros(num_heads, count, dtype=torch.float32, device=device)
        found = mixed_tables(adapter, values, values.new_ones(1))
        if isinstance(adapter, TalkingHeads) or adapter.kernel_size > 1:
            return found
        static, hidden, weight_in, weight_out = found
        alone = adapter.inputs == "bias"
        at_zero = leaky_relu(hidden if alone else hidden.detach(), SLOPE)
        static = static + weight_out @ at_zero.t()
        return (static,) if alone else (static, hidden, weight_in, weight_out)


def fire_tables(
    bias: FIRE, adapter: nn.Module | None, count: int, device: torch.device, key_offset: int
) -> tuple[Tensor, ...]:
    """Return C `[H, 1 + F]`, U `[1 + F, D]`, W1a and W2 over features, psi, 1 / psi, v and c.

    psi `[N]` is over distances, 1 / psi(max(i, L)) `[N]` over the indices i from that of the first
    key on, v and c are `[F]`. Without an adapter D = 0.
    """
    distances = torch.arange(count, dtype=bias.c.dtype, device=device)
    psi = torch.log1p(bias.c * distances).float()
    scale = 1 / torch.log1p(bias.c * torch.maximum(distances + key_offset, bias.threshold)).float()
    values = torch.cat((bias.bias_out[:, None], bias.weight_out), dim=1).float()
    mixing: tuple[Tensor, ...]
    if isinstance(adapter, DAPE | TalkingHeads):
        # Not by assignment, which copies from the host and so cannot be part of a CUDA graph.
        constant = (torch.arange(values.shape[1], device=device) == 0).to(values)
        mixing = mixed_tables(adapter, values, constant)
    else:
        shapes = (values.shape[1], 0), (0, len(values)), (len(values), 0)
        mixing = (values, *(values.new_zeros(shape) for shape in shapes))
    return *mixing, psi, scale, bias.weight_in[:, 0].float(), bias.bias_in.float()


def mixed_tables(
    adapter: DAPE | TalkingHeads,
    values: Float[Tensor, "heads entries"],
    constant: Float[Tensor, "#entries"],
) -> tuple[Tensor, ...]:
    """Return C, U, W1a and W2 from the table of B; `constant` is the number one as a table.

    It has one entry if all are alike. Few and simple operations: in decoding, each takes as long
    as a part of the cache.
    """
    if isinstance(adapter, TalkingHeads):
        return talking_tables(adapter, values)
    return dape_tables(adapter, values, constant)


def dape_tables(
    adapter: DAPE, values: Float[Tensor, "heads entries"], constant: Float[Tensor, "#entries"]
) -> tuple[Tensor, ...]:
    """Return C, U, W1a and W2 of `A + B + f([A; B])`; with taps, b1 too, and U without it."""
    # Taps and units on one axis.
    weight_in = adapter.weight_in.float().permute(2, 0, 1).flatten(0, 1)
    weight_out = adapter.weight_out.float().transpose(1, 2).flatten(1)
    bias_in, bias_out = adapter.bias_in.float(), adapter.bias_out.float()
    static = values if adapter.residual else torch.zeros_like(values)
    static = static + bias_out[:, None] * constant
    on_scores = on_bias = weight_in
    if adapter.inputs == "concat":
        on_scores, on_bias = weight_in.split(adapter.num_heads, dim=1)
    elif adapter.inputs == "scores":
        on_bias = torch.zeros_like(weight_in)
    elif adapter.inputs == "bias":
        on_scores = torch.zeros_like(weight_in)
    if adapter.kernel_size > 1:
        return static, values.t() @ on_bias.t(), on_scores, weight_out, bias_in
    hidden = torch.addmm(constant[:, None] * bias_in, values.t(), on_bias.t())
    return static, hidden, on_scores, weight_out


def talking_tables(
    adapter: TalkingHeads, values: Float[Tensor, "heads entries"]
) -> tuple[Tensor, ...]:
    """Return C, U, W1 and W2 of `S + P S` from the table of B.

    A linear layer is `P x = P (phi(x) - phi(-x)) / (1 + slope)` to the kernels.
    """
    weight = adapter.weight.float()
    one = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    hidden = values.new_zeros(values.shape[1], hidden_units(adapter))
    weight_in, weight_out = torch.cat((one, -one)), torch.cat((weight, -weight), dim=1)
    return values + weight @ values, hidden, weight_in, weight_out / (1 + SLOPE)
