r"""Adapters: maps from the scores A and the bias B to the logits of the softmax.

An adapter maps `A = q k^T / sqrt(d)` `[batch, heads, query, key]` and B `[heads, query, key]` to
logits of the shape of A. An adapter sees a block of query rows with whole rows of keys, in float32
or wider. Without an adapter the logits are A + B. Any module `adapter(A, B) -> logits` is an
adapter. A module with `needs_rows = True` takes `Rows` as a third argument. An adapter with `reach`
has logits that depend on at most `reach` keys to each side, and may be given a part of the keys.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pad

from dape.errors import UserError, check_switch, check_whole
from dape.positions.bias import sinusoids
from dape.positions.wide import Wide, own_dtypes, parameter

INPUTS = ("concat", "sum", "bias", "scores")


class Rows(NamedTuple):
    """The query rows of a block of scores, for adapters with `needs_rows = True`.

    `visible` is true where a query may see a key, and false for later keys and padding. Positions
    are in tokens, and `scale` is the factor of the scores. Where the keys are a part
    of all, `begun` is true for rows that may have seen a key before the first.
    """

    query: Float[Tensor, "batch heads query head_dim"]
    key: Float[Tensor, "batch kv_heads key head_dim"]
    query_positions: Int[Tensor, "*batch query"]
    key_positions: Int[Tensor, "*batch key"]
    visible: Bool[Tensor, "#batch 1 query key"]
    scale: float
    begun: Bool[Tensor, "#batch 1 #query"] | None = None


def adapted(
    adapter: Callable[..., Tensor] | None,
    scores: Float[Tensor, "batch heads query key"],
    bias: Float[Tensor, "*#batch heads query key"],
    rows: Rows,
) -> Float[Tensor, "batch heads query key"]:
    """Return the logits of an adapter, which gets the rows if it needs them, or A + B.

    Raises:
        UserError: for logits of another shape or dtype than the scores.
    """
    if adapter is None:
        return scores + bias
    more = (rows,) if getattr(adapter, "needs_rows", False) else ()
    logits = adapter(scores, bias, *more)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the adapter {type(adapter).__name__} returned a {type(logits).__name__}; it must "
            "return a tensor of logits"
        )
    if logits.shape != scores.shape or logits.dtype != scores.dtype:
        raise UserError(
            f"the adapter {type(adapter).__name__} returned {list(logits.shape)} in "
            f"{logits.dtype}; it must return logits in shape and dtype of the scores, "
            f"[batch, heads, rows, keys] = {list(scores.shape)} in {scores.dtype}"
        )
    return logits


class DAPE(Wide):
    r"""Data-adaptive positional encoding (Zheng et al., NeurIPS 2024): A + B + f([A; B]).

    f = W2 LeakyReLU_0.01(W1 x + b1) + b2 acts across the heads, and all (query, key) share f.

    | inputs | f sees | with residual | without |
    |---|---|---|---|
    | `concat` | [A; B] | A + B + f (Eq. 3) | A + f (Eq. 2) |
    | `sum` | A + B | A + B + f | A + f |
    | `bias` | B | A + B + f (ablation of Table 7) | A + f |
    | `scores` | A | A + B + f | A + f |

    `kernel_size` k > 1 is DAPE V2 (Zheng et al., ACL 2025). Both layers are 1 x k convolutions
    along the keys, and invisible keys count as zeros. A row is computed as if masked keys followed,
    and both layers see zeros before the first visible key. Therefore the length, padding and a
    cache change no logit. The authors' code masks by `tril` alone, and the last k // 2 logits of a
    row depend on whether keys follow.

    The parameters start as the parameters of `nn.Linear`.

    Args:
        num_heads: number of query heads H.
        hidden: width D of the hidden layer of f, 32 in the paper's language models.
        kernel_size: keys in a convolution, odd; 1 is DAPE, 3 or more DAPE V2.
        residual: whether B is added to the logits beside f.
        inputs: input of f, a row of the table.

    Raises:
        UserError: for unknown `inputs`, a `hidden` below 1, or an even or non-positive
            `kernel_size`.
    """

    def __init__(
        self,
        num_heads: int,
        hidden: int = 32,
        kernel_size: int = 1,
        residual: bool = True,
        inputs: str = "concat",
    ) -> None:
        super().__init__()
        if inputs not in INPUTS:
            raise UserError(f"inputs={inputs!r} is not one of {', '.join(INPUTS)}")
        check_whole(num_heads=num_heads, hidden=hidden, kernel_size=kernel_size)
        check_switch(residual=residual)
        if kernel_size % 2 == 0:
            raise UserError(
                f"kernel_size={kernel_size} must be odd: a key and as many on each side"
            )
        self.num_heads, self.hidden, self.kernel_size = num_heads, hidden, kernel_size
        self.residual, self.inputs = residual, inputs
        channels = 2 * num_heads if inputs == "concat" else num_heads
        self.weight_in = parameter(hidden, channels, kernel_size)
        self.bias_in = parameter(hidden)
        self.weight_out = parameter(num_heads, hidden, kernel_size)
        self.bias_out = parameter(num_heads)
        self.reset_parameters()

    @property
    def needs_rows(self) -> bool:
        """Whether f looks along the keys and needs the mask."""
        return self.kernel_size > 1

    @property
    def reach(self) -> int:
        """Number of keys to each side on which a logit depends."""
        return 2 * (self.kernel_size // 2)

    def reset_parameters(self) -> None:
        """Draw both layers from U(-1, 1) / sqrt(fan in)."""
        for weight, bias in ((self.weight_in, self.bias_in), (self.weight_out, self.bias_out)):
            bound = 1 / math.sqrt(weight[0].numel())
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(
        self,
        scores: Float[Tensor, "batch heads query key"],
        bias: Float[Tensor, "*#batch heads query key"],
        rows: Rows | None = None,
    ) -> Float[Tensor, "batch heads query key"]:
        """Return logits `[batch, heads, query, key]`; without `rows` every key is visible."""
        base = scores + bias if self.residual else scores
        parts = {
            "concat": (scores, bias),
            "sum": (scores + bias,),
            "bias": (bias,),
            "scores": (scores,),
        }[self.inputs]
        weights = self.weight_in.split(self.num_heads, dim=1)
        reach = self.kernel_size // 2
        if reach:
            visible = (
                torch.ones_like(scores[:, :1], dtype=torch.bool) if rows is None else rows.visible
            )
            # The second layer needs hidden units up to `reach` columns past the last key.
            parts = tuple(pad(torch.where(visible, part, 0), (reach, 2 * reach)) for part in parts)
        hidden = self.bias_in.to(scores.dtype)[:, None, None]
        for part, weight in zip(reversed(parts), reversed(weights), strict=True):
            hidden = mix(part, weight) + hidden
        hidden = leaky_relu(hidden, 0.01, inplace=True)
        if reach:
            started = visible.cumsum(-1) > 0
            if rows is not None and rows.begun is not None:
                started = started | rows.begun[..., None]
            started = pad(started, (0, reach), value=True)
            hidden = pad(torch.where(started, hidden, 0), (reach, 0))
        return base + mix(hidden, self.weight_out) + self.bias_out.to(base.dtype)[:, None, None]


def mix(
    x: Float[Tensor, "*batch channels query padded"], weight: Float[Tensor, "out channels taps"]
) -> Float[Tensor, "*batch out query key"]:
    """Return the 1 x k convolution along the keys, `sum_t W_t x[j + t]`.

    A product replaces `conv1d`, because convolutions run in TF32 on a GPU by default. Taps become
    channels on the side that has fewer of them.
    """
    weight, (out, channels, taps) = weight.to(x.dtype), weight.shape
    keys = x.shape[-1] - taps + 1
    if taps == 1:
        return across(weight[:, :, 0], x)
    if channels < out:
        # `stack`, because `vmap` of `cat` fixes the length in a compilation for all lengths.
        shifted = torch.stack([x[..., tap : tap + keys] for tap in range(taps)], dim=-4)
        return across(weight.mT.flatten(1), shifted.flatten(-4, -3))
    parts = across(weight.permute(2, 0, 1).flatten(0, 1), x).unflatten(-3, (taps, out))
    moved = [parts[..., tap, :, :, tap : tap + keys] for tap in range(taps)]
    return sum(moved[1:], moved[0])


def across(
    weight: Float[Tensor, "out channels"], x: Float[Tensor, "*batch channels query key"]
) -> Float[Tensor, "*batch out query key"]:
    """Return a product with the channels at each query and key."""
    with own_dtypes(x.device):
        return torch.einsum("oc,...cqk->...oqk", weight, x)


class TalkingHeads(Wide):
    r"""Talking heads before the softmax: S + P S for S = A + B, P an H x H matrix across heads.

    Shazeer et al., 2020. I + P is the paper's projection of the logits. P starts at zero, and a
    model starts as the base scheme without mixing. Talking heads are the plain baseline of head
    mixing, without a hidden layer and without B apart from A. An adapter cannot compute the paper's
    second projection, of the weights after the softmax. `pre_talking_heads` of x-transformers mixes
    A alone and starts at P = I.

    Args:
        num_heads: number of query heads H.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        check_whole(num_heads=num_heads)
        self.num_heads = num_heads
        self.weight = parameter(num_heads, num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set P = 0."""
        nn.init.zeros_(self.weight)

    def forward(
        self,
        scores: Float[Tensor, "batch heads query key"],
        bias: Float[Tensor, "*#batch heads query key"],
    ) -> Float[Tensor, "batch heads query key"]:
        """Return the mixed sums."""
        total = scores + bias
        return total + mix(total, self.weight[:, :, None])


class CoPE(Wide):
    r"""Contextual position encoding: A + B + q_i . e[p_ij] (Golovneva et al., 2024, section 4).

    The position `p_ij = sum_k sigmoid(A_ik)` sums gates over the visible keys k from j to the
    query, j and query included, up to `npos_max` - 1. e[p] interpolates between the two nearest of
    `npos_max` learnable embeddings. The heads share the embeddings, and the embeddings start at
    zero. Scores are scaled and q is not, as in the listing of the paper's appendix.

    The paper is causal. In bidirectional use, positions count outwards from the query on both
    sides. Keys must be in the order of positions. The paper has no bias. CoPE adds the bias
    B, outside the gates.

    Args:
        head_dim: width of a head.
        npos_max: number of embeddings, 64 in DAPE's comparison.

    Raises:
        UserError: for an `npos_max` below 1.
    """

    needs_rows = True

    def __init__(self, head_dim: int, npos_max: int = 64) -> None:
        super().__init__()
        check_whole(head_dim=head_dim, npos_max=npos_max)
        self.head_dim = head_dim
        self.weight = parameter(npos_max, head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every embedding to zero."""
        nn.init.zeros_(self.weight)

    def forward(
        self,
        scores: Float[Tensor, "batch heads query key"],
        bias: Float[Tensor, "*#batch heads query key"],
        rows: Rows,
    ) -> Float[Tensor, "batch heads query key"]:
        """Return logits `[batch, heads, query, key]`."""
        place = self.places(scores, rows)
        with own_dtypes(scores.device):
            table = rows.query.to(scores.dtype) @ self.weight.to(scores.dtype).mT
        below, above = (table.gather(-1, x.long()) for x in (place.floor(), place.ceil()))
        return scores + bias + below.lerp(above, place - place.floor())

    def places(
        self, scores: Float[Tensor, "batch heads query key"], rows: Rows
    ) -> Float[Tensor, "batch heads query key"]:
        """Return `p_ij`, summed outwards from the query to keep the digits of near gates."""
        gates = torch.where(rows.visible, scores.sigmoid(), 0)
        query = rows.query_positions[..., None, :, None]
        key = rows.key_positions[..., None, None, :]
        before = torch.where(key <= query, gates, 0).flip(-1).cumsum(-1).flip(-1)
        after = torch.where(key >= query, gates, 0).cumsum(-1)
        return torch.where(key <= query, before, after).clamp(max=len(self.weight) - 1)


class TransformerXL(Wide):
    r"""Transformer-XL's terms: A + B + scale (u . k_j + (q_i + v) . W r(i - j)), by head.

    Dai et al., 2019, section 3.3. A head has W of shape [head_dim, hidden_size] and vectors u, v of
    shape [head_dim]. r is the sinusoidal embedding of the signed distance, with `hidden_size`
    entries. All parameters start from N(0, 0.02), as in the code of the authors and of DAPE. Layers
    do not share parameters.

    r(i - j) is never formed. By the addition theorems, `W^T (q_i + v)` is turned by i and
    multiplied with the sines and cosines of j. The factored form takes any positions and costs
    `hidden_size` products per query and key. A table of distances and a shift would cost
    `head_dim`.

    Args:
        num_heads: number of query heads H.
        head_dim: width of a head.
        hidden_size: width of the sinusoids, the model's width in the paper.

    Raises:
        UserError: for an odd or non-positive `hidden_size`.
    """

    needs_rows = True
    reach = 0

    def __init__(self, num_heads: int, head_dim: int, hidden_size: int) -> None:
        super().__init__()
        check_whole(num_heads=num_heads, head_dim=head_dim)
        check_whole(2, hidden_size=hidden_size)
        if hidden_size % 2:
            raise UserError(f"hidden_size={hidden_size} must be even and positive: sines, cosines")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.weight = parameter(num_heads, head_dim, hidden_size)
        self.u = parameter(num_heads, head_dim)
        self.v = parameter(num_heads, head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all three anew."""
        for weight in (self.weight, self.u, self.v):
            nn.init.normal_(weight, std=0.02)

    def forward(
        self,
        scores: Float[Tensor, "batch heads query key"],
        bias: Float[Tensor, "*#batch heads query key"],
        rows: Rows,
    ) -> Float[Tensor, "batch heads query key"]:
        """Return logits `[batch, heads, query, key]`."""
        with own_dtypes(scores.device):
            terms = self.content(rows, scores) + self.offset(rows, scores)
        return scores + bias + rows.scale * terms

    def content(self, rows: Rows, scores: Tensor) -> Float[Tensor, "batch heads 1 key"]:
        """Return `u . k_j`, in the dtype of the scores."""
        key = rows.key.to(scores.dtype)
        grouped = self.u.to(scores.dtype).unflatten(0, (key.shape[1], -1))
        return torch.einsum("kgd,bkjd->bkgj", grouped, key).flatten(1, 2).unsqueeze(2)

    def offset(self, rows: Rows, scores: Tensor) -> Float[Tensor, "batch heads query key"]:
        """Return `(q_i + v) . W r(i - j)`, in the dtype of the scores."""
        weight, v = self.weight.to(scores.dtype), self.v.to(scores.dtype)
        waves = torch.einsum("bhid,hdw->bhiw", rows.query.to(scores.dtype) + v[:, None], weight)
        query, key = (
            sinusoids(positions, weight.shape[2], scores.dtype).unsqueeze(-3)
            for positions in (rows.query_positions, rows.key_positions)
        )
        (a, b), (sine, cosine) = waves.chunk(2, -1), query.chunk(2, -1)
        turned = torch.stack((b * sine - a * cosine, a * sine + b * cosine), dim=-2)
        keys = key.squeeze(-3).expand(turned.shape[0], -1, -1)
        return torch.einsum("bhiw,bjw->bhij", turned.flatten(-2), keys)
