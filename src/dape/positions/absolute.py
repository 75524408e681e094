r"""Embeddings: a vector of the position, added to the vector of a token below all layers.

An embedding maps `x` `[B, T, C]` and positions `[T]` or `[B, T]` to `[B, T, C]`. Tables and sums
are float32 or wider in a model of any dtype. No embedding is `relative`, because the logits depend
on the first position of a sequence.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dape.errors import UserError, check_finite, check_whole
from dape.positions.given import check_positions
from dape.positions.wide import Wide, parameter


def frequencies(
    width: int, base: float | Tensor, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "... pairs"]:
    r"""Return `base^(-2 i / width)` for the pairs i = 0 .. (width - 1) // 2, in radians a token.

    The geometric progression of Vaswani et al. and of RoPE. `base` broadcasts against the pairs.
    """
    return 1 / base ** (torch.arange(0, width, 2, dtype=dtype, device=device) / width)


class Sinusoidal(nn.Module):
    r"""Sinusoids: `s x + P(p)`, with `P_2i = sin(p w_i)`, `P_2i+1 = cos(p w_i)`.

    w_i = 10000^(-2 i / C) for width C, at any position p (Vaswani et al., 2017, section 3.5). The
    scale s of the tokens is `sqrt(C)`, as in section 3.4 of the paper. Vectors drawn with a
    standard deviation of about `1 / sqrt(C)` are then as large as the sinusoids. GPT-NeoX has no
    scale, and tokens start 30 times smaller than positions. Implementations that put all sines
    before all cosines rename the dimensions.

    Args:
        hidden_size: width C of the model.
        base: base of the frequencies.
        token_scale: scale s of the tokens, `sqrt(hidden_size)` by default.
    """

    relative = False

    def __init__(
        self, hidden_size: int, base: float = 10000.0, token_scale: float | None = None
    ) -> None:
        super().__init__()
        check_whole(hidden_size=hidden_size)
        check_finite(1, base=base)
        self.base = base
        self.token_scale = math.sqrt(hidden_size) if token_scale is None else token_scale
        check_finite(token_scale=self.token_scale)

    def forward(
        self, x: Float[Tensor, "batch length width"], positions: Int[Tensor, "... length"]
    ) -> Float[Tensor, "batch length width"]:
        """Return `s x + P(positions)` `[B, T, C]`."""
        check_positions(positions, x.shape[0], x.shape[-2])
        width, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        angles = positions[..., None] * frequencies(width, self.base, wide, x.device)
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        return (self.token_scale * x.to(wide) + waves[..., :width]).to(x.dtype)


class Learned(Wide):
    r"""Learned embeddings: `x + W_p`, a row for each position below `train_length`.

    As in GPT-2 (Radford et al., 2019) and Gehring et al. (2017). W starts as the token embedding of
    GPT-NeoX, N(0, 2 / (5 C)).

    A check of positions makes the host wait for a GPU, and cannot be compiled. In training on a GPU
    and under `torch.compile`, the check takes the length for the largest position. Without padding
    and `position_ids` the check is exact. Otherwise the lookup fails at positions outside the
    table.

    Args:
        train_length: number of rows of the table, in tokens.
        hidden_size: width C of the model.

    Raises:
        UserError: for a position outside the table.
    """

    relative = False

    def __init__(self, train_length: int, hidden_size: int) -> None:
        super().__init__()
        check_whole(train_length=train_length, hidden_size=hidden_size)
        self.weight = parameter(train_length, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / (5 * self.weight.shape[1])))

    def forward(
        self, x: Float[Tensor, "batch length width"], positions: Int[Tensor, "... length"]
    ) -> Float[Tensor, "batch length width"]:
        """Return `x + W[positions]` `[B, T, C]`."""
        check_positions(positions, x.shape[0], x.shape[-2])
        self.check(x.shape[1], positions)
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = nn.functional.embedding(positions, self.weight)
        return (x.to(wide) + rows.to(wide)).to(x.dtype)

    def check(self, length: int, positions: Int[Tensor, "... length"]) -> None:
        """Raise a `UserError` for a position outside the table."""
        size, low, high = len(self.weight), 0, length - 1
        if not torch.compiler.is_compiling() and not (self.training and positions.is_cuda):
            low, high = (int(position) for position in positions.aminmax())
        if low < 0 or high >= size:
            raise UserError(
                f"position {high if high >= size else low} is outside the learned embedding, whose "
                f"table ends at train_length={size}: give fewer tokens, train at a greater "
                "train_length, or take a scheme without a table, such as dape-kerple"
            )
