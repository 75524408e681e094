r"""A bias and an adapter as tables over the distance, by ordinary differentiable code.

If B depends on the distance alone, then so does all that DAPE makes of it: with W1 = [W1a, W1b] on
[A; B], the logits are `A + C + W2 phi(W1a A + U)` for tables `U = W1b B + b1` and `C = B + b2`. The
kernels take the tables and give their gradients; what stands behind them is autograd's.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from dape.positions.adapter import DAPE


def obstacle(bias: nn.Module | None, adapter: nn.Module | None) -> str | None:
    """Return why a bias and an adapter are no tables, or None if they are."""
    if bias is not None and not getattr(bias, "relative", False):
        return f"{type(bias).__name__} depends on more than the distance"
    if adapter is not None and type(adapter) is not DAPE:
        return f"the fused kernels do not know the adapter {type(adapter).__name__}"
    if isinstance(adapter, DAPE) and adapter.kernel_size > 1:
        return f"they mix heads at each key alone, and kernel_size={adapter.kernel_size}"
    return None


def tables(
    bias: nn.Module | None,
    adapter: nn.Module | None,
    num_heads: int,
    count: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Return C `[H, N]`, U `[N, D]`, W1a `[D, H]` and W2 `[H, D]` over the distances 0..N-1.

    In float32. Where no scores are mixed there is C alone, and nothing without a bias.
    """
    with torch.autocast(device.type, enabled=False):
        values = None
        if bias is not None:
            distances = torch.arange(count, device=device)
            values = bias(distances, distances[:1])[..., 0].float()
        if isinstance(adapter, DAPE):
            return dape_tables(
                adapter, torch.zeros(num_heads, count, device=device) if values is None else values
            )
        return () if values is None else (values,)


def dape_tables(adapter: DAPE, values: Float[Tensor, "heads distances"]) -> tuple[Tensor, ...]:
    """Return the tables of DAPE over a bias; one that sees the bias alone mixes no scores."""
    weight_in, weight_out = adapter.weight_in[..., 0].float(), adapter.weight_out[..., 0].float()
    bias_in, bias_out = adapter.bias_in.float(), adapter.bias_out.float()
    static = bias_out[:, None] + (values if adapter.residual else torch.zeros_like(values))
    if adapter.inputs == "bias":
        hidden = leaky_relu(values.t() @ weight_in.t() + bias_in, 0.01)
        return (static + weight_out @ hidden.t(),)
    if adapter.inputs == "scores":
        return static, bias_in.expand(values.shape[1], -1), weight_in, weight_out
    on_scores = on_bias = weight_in
    if adapter.inputs == "concat":
        on_scores, on_bias = weight_in.split(adapter.num_heads, dim=1)
    return static, values.t() @ on_bias.t() + bias_in, on_scores, weight_out
