r"""Biases: functions of the positions of a query and a key, added to their attention score.

A bias maps positions to `B` with one matrix per head. Position is an argument, so that caches,
padding, chunks and sequence parallelism need nothing of their own. Distances and parameters are
taken in float32 or wider whatever the dtype of the model: bfloat16 cannot tell 256 from 257.
In bidirectional use the distance is `|i - j|` for every bias alike.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Bias(nn.Module):
    """The interface of a bias: `bias(query_positions, key_positions) -> B`.

    `relative` says that B depends on the distance alone, which lets a kernel keep it as a table.
    """

    relative = True

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return B for every query and key position."""
        raise NotImplementedError


def distance(
    query_positions: Int[Tensor, "*batch query"],
    key_positions: Int[Tensor, "*batch key"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*batch 1 query key"]:
    """Return `|i - j|`, exact in float32 up to 2^24, with an axis for the heads."""
    difference = query_positions[..., :, None] - key_positions[..., None, :]
    return difference.abs().to(torch.promote_types(dtype, torch.float32)).unsqueeze(-3)


def per_head(parameter: Float[Tensor, "heads"]) -> Float[Tensor, "heads 1 1"]:
    """Return a parameter of each head in at least float32, ready to meet `distance`."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))[:, None, None]


def inverse_softplus(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return x with `softplus(x) = value`, for a positive `value`."""
    return value + torch.log(-torch.expm1(-value))


class NoBias(Bias):
    """No bias: B = 0 (NoPE of Kazemnejad et al., 2023, when nothing else carries position)."""

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return zeros, without storing them."""
        batch, query, key = (
            query_positions.shape[:-1],
            query_positions.shape[-1],
            key_positions.shape[-1],
        )
        return torch.zeros((), device=query_positions.device).expand(
            *batch, self.num_heads, query, key
        )


class ALiBi(Bias):
    r"""ALiBi: `B_h = -s_h |i - j|` with fixed slopes (Press et al., 2022, section 3).

    For a power of two of heads the slopes are `2^(-8 h / H)`, h = 1..H. Otherwise those of the
    next smaller power of two M come first, then every second one of the sequence for 2 M, as the
    authors' code does; the paper names only powers of two.
    """

    def slopes(self, device: torch.device | None = None) -> Float[Tensor, "heads"]:
        """Return `s_h`; computed when asked, so that casting a model cannot round them."""
        even = 2 ** math.floor(math.log2(self.num_heads))
        whole = torch.arange(1, even + 1, device=device) * (8 / even)
        halves = (2 * torch.arange(self.num_heads - even, device=device) + 1) * (4 / even)
        return torch.exp2(-torch.cat((whole, halves)))

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return `-s_h |i - j|`."""
        slopes = self.slopes(query_positions.device)
        return -per_head(slopes) * distance(query_positions, key_positions)


class Kerple(Bias):
    r"""Kerple, logarithmic: `B_h = -p_h log(1 + a_h |i - j|)` (Chi et al., 2022, section 4).

    Learnable p, a > 0 for each head, starting at p ~ U(0, 2) and a ~ U(0, 1). Positivity is by
    softplus; the authors' and DAPE's code clamp `.data` at 0.01 in every forward instead, which
    sharding and compilation forbid. The start keeps their floor of 0.01.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__(num_heads)
        self.raw_p = nn.Parameter(torch.empty(num_heads))
        self.raw_a = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw p and a anew."""
        with torch.no_grad():
            for raw, high in ((self.raw_p, 2.0), (self.raw_a, 1.0)):
                nn.init.uniform_(raw, 0.01, high)
                raw.copy_(inverse_softplus(raw))

    @property
    def p(self) -> Float[Tensor, "heads"]:
        """The weight of each head."""
        return nn.functional.softplus(
            self.raw_p.to(torch.promote_types(self.raw_p.dtype, torch.float32))
        )

    @property
    def a(self) -> Float[Tensor, "heads"]:
        """The inverse length scale of each head, per token."""
        return nn.functional.softplus(
            self.raw_a.to(torch.promote_types(self.raw_a.dtype, torch.float32))
        )

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return `-p_h log(1 + a_h |i - j|)`."""
        delta = distance(query_positions, key_positions, self.raw_p.dtype)
        return -per_head(self.p) * torch.log1p(per_head(self.a) * delta)
