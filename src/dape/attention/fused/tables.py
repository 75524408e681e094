r"""A bias and an adapter as tables over the distance, by ordinary differentiable code.

If B depends on the distance alone, then the hidden units of DAPE at A = 0 do too. With
W1 = [W1a, W1b] on [A; B] and tables `U = W1b B + b1` and `C = B + b2 + W2 phi(U)`, the logits are

    A + C + W2 (phi(W1a A + U) - phi(U)).

C holds the logits at A = 0 and stays in float32. A bias of 1e5 is therefore as exact as in other
backends. Numbers in 16 bits grow with the scores, never with the bias. The kernels take the tables
and return the gradients of the tables. Autograd takes the gradients from there to the parameters.
The gradient of U is complete, since the kernels count how U enters C.

FIRE depends on the row too. FIRE is linear in features `f = (1, relu(v x + c))` of the number
`x = psi(|i - j|) / psi(max(i, j, L))`. The logits are `A + C f + W2 phi(W1a A + U f)`, with tables
over the features instead of the distances. x is an entry of a table over the distance, times an
entry of a table over the later index.
"""

from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from dape.attention.fused import table_operators as operators
from dape.attention.fused.formed import Formed, form_of
from dape.attention.fused.terms import SLOPE
from dape.positions.adapter import DAPE, TalkingHeads
from dape.positions.bias import FIRE


def hidden_units(adapter: nn.Module | None) -> int:
    """Return how many hidden units the tables of an adapter have, 0 without."""
    if isinstance(adapter, TalkingHeads):
        return 2 * adapter.num_heads
    return adapter.hidden if isinstance(adapter, DAPE) else 0


def obstacle(bias: nn.Module | None, adapter: nn.Module | None) -> str | None:
    """Return why no tables serve a bias and an adapter, or None."""
    if not (bias is None or type(bias) is FIRE or getattr(bias, "relative", False)):
        return f"{type(bias).__name__} depends on more than the distance"
    if adapter is not None and type(adapter) not in (DAPE, TalkingHeads):
        return f"the fused kernels do not know the adapter {type(adapter).__name__}"
    if type(bias) is FIRE and isinstance(adapter, DAPE) and adapter.kernel_size > 1:
        return f"FIRE with kernel_size={adapter.kernel_size}: the fused kernels serve kernel_size=1"
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

    Tables are float32. Without mixing the tables of `Static` are returned, and without a bias
    nothing. For DAPE V2 axes of hidden units hold D for every tap, b1 comes last, and C lacks
    `W2 phi(U)`. For FIRE entries are features, `fire_tables` names the further tables, and C lacks
    `W2 phi(U)` too.
    """
    with torch.autocast(device.type, enabled=False):
        if isinstance(bias, FIRE):
            return fire_tables(bias, adapter, count, key_offset)
        if bias is None and adapter is None:
            return ()
        form = form_of(bias)
        if form is not None and adapter is None:
            return bias_tables(form, num_heads, count, device)
        if form is not None and mixes_scores(adapter):
            return fast_tables(adapter, form, None, num_heads, count)
        values = values_of(bias, num_heads, count, device)
        if isinstance(adapter, TalkingHeads):
            return talking_tables(adapter, values)
        if mixes_scores(adapter):
            return fast_tables(adapter, Formed(), values, num_heads, count)
        return alone_tables(adapter, values) if isinstance(adapter, DAPE) else (values,)


def mixes_scores(adapter: nn.Module | None) -> TypeGuard[DAPE]:
    """Return whether an adapter is a DAPE whose layers see the scores."""
    return isinstance(adapter, DAPE) and adapter.inputs != "bias"


def first_column(adapter: DAPE) -> int:
    """Return the first column of W1 on B, or -1 if the layers do not see B."""
    return {"concat": adapter.num_heads, "sum": 0, "scores": -1}[adapter.inputs]


def values_of(
    bias: nn.Module | None, num_heads: int, count: int, device: torch.device
) -> Float[Tensor, "heads distances"]:
    """Return B over the distances, from the `forward` of the module."""
    if bias is None:
        return torch.zeros(num_heads, count, dtype=torch.float32, device=device)
    distances = torch.arange(count, device=device)
    return bias(distances, distances[:1])[..., 0].float().contiguous()


def bias_tables(
    form: Formed, num_heads: int, count: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Return the tables of `Static` for a bias with a form.

    Learnable parameters `[H]` have a Jacobian. The gradient of C goes back to a parameter
    `[rows, H]`.
    """
    name, p0, p1, span = form
    parameters = [x for x in (p0, p1) if x is not None]
    learn = torch.is_grad_enabled() and any(x.requires_grad for x in parameters)
    if learn and span == 0:
        given = [x if x is None else x.detach() for x in (p0, p1)]
        how = operators.How(name, count, num_heads, derivatives=len(parameters))
        found = operators.tables(None, *given, *[None] * 4, *how)
        return *found, torch.stack(parameters)
    if not parameters:  # an operator knows the device by a tensor
        p0 = torch.empty(num_heads, device=device)
    how = operators.How(name, count, num_heads, span=span)
    return tuple(operators.tables(None, p0, p1, *[None] * 4, *how))


def fast_tables(
    adapter: DAPE,
    form: Formed,
    values: Float[Tensor, "heads entries"] | None,
    num_heads: int,
    count: int,
    features: bool = False,
) -> tuple[Tensor, ...]:
    """Return C, U, W1a, W2 and perhaps b1, from a single kernel.

    B comes from a form or from `values`. With `features` entries are features of FIRE.
    """
    name, p0, p1, span = form
    taps = adapter.kernel_size
    linear, on_bias = features or taps > 1, first_column(adapter)
    how = operators.How(name, count, num_heads, on_bias, adapter.residual, linear, features, span)
    layers = adapter.weight_in, adapter.bias_in, adapter.weight_out, adapter.bias_out
    if taps > 1:
        found = operators.tables(values, p0, p1, *with_free_bias(layers), *how)
        return *found, adapter.bias_in.float()
    return tuple(operators.tables(values, p0, p1, *layers, *how))


def with_free_bias(layers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the layers with b1 detached, since b1 enters no table of DAPE V2."""
    weight_in, bias_in, weight_out, bias_out = layers
    return weight_in, bias_in.detach(), weight_out, bias_out


def fire_tables(
    bias: FIRE, adapter: nn.Module | None, count: int, key_offset: int
) -> tuple[Tensor, ...]:
    """Return C `[H, 1 + F]`, U `[1 + F, D]`, W1a and W2 over features, psi, 1 / psi, v and c.

    psi `[N]` is over distances. 1 / psi(max(i, L)) `[N]` is over indices i from `key_offset` on.
    v and c are `[F]`. Without an adapter D = 0.
    """
    psi, scale = operators.fire_tables(bias.log_c, bias.log_threshold, count, key_offset)
    values = torch.cat((bias.bias_out[:, None], bias.weight_out), dim=1).float()
    heads, entries = values.shape
    mixing: tuple[Tensor, ...]
    if isinstance(adapter, TalkingHeads):
        mixing = talking_tables(adapter, values)
    elif mixes_scores(adapter):
        mixing = fast_tables(adapter, Formed(), values, heads, entries, True)
    elif isinstance(adapter, DAPE):
        mixing = feature_tables_alone(adapter, values)
    else:
        shapes = (entries, 0), (0, heads), (heads, 0)
        mixing = (values, *(values.new_empty(shape) for shape in shapes))
    return *mixing, psi, scale, bias.weight_in.flatten().float(), bias.bias_in.float()


def alone_tables(adapter: DAPE, values: Float[Tensor, "heads distances"]) -> tuple[Tensor, ...]:
    """Return C of `A + B + f(B)`, where no scores are mixed; with taps all tables."""
    if adapter.kernel_size > 1:
        return dape_tables(adapter, values, values.new_ones(1))
    static, hidden, _, weight_out = dape_tables(adapter, values, values.new_ones(1))
    return (static + weight_out @ leaky_relu(hidden, SLOPE).t(),)


def feature_tables_alone(
    adapter: DAPE, values: Float[Tensor, "heads features"]
) -> tuple[Tensor, ...]:
    """Return the tables of `A + B + f(B)` over FIRE's features."""
    # An assignment would copy from the host, and a CUDA graph cannot hold a copy from the host.
    constant = (torch.arange(values.shape[1], device=values.device) == 0).to(values)
    return dape_tables(adapter, values, constant)


def dape_tables(
    adapter: DAPE, values: Float[Tensor, "heads entries"], constant: Float[Tensor, "#entries"]
) -> tuple[Tensor, ...]:
    """Return C, U, W1a and W2 of `A + B + f(B)`; for DAPE V2 U without b1, and b1.

    `constant` is the number 1 as a table, of a single entry if all entries are alike.
    """
    # Taps and units on a common axis.
    on_bias = adapter.weight_in.float().permute(2, 0, 1).flatten(0, 1)
    weight_out = adapter.weight_out.float().transpose(1, 2).flatten(1)
    bias_in, bias_out = adapter.bias_in.float(), adapter.bias_out.float()
    static = values if adapter.residual else torch.zeros_like(values)
    static = static + bias_out[:, None] * constant
    on_scores = torch.zeros_like(on_bias)
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
