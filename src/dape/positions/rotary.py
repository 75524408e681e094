r"""Rotations: queries and keys turned by their positions, so that scores see the difference.

A rotation maps `q, k, positions -> q, k`; positions are `[T]`, or `[B, T]` where padding shifts
them. It turns pairs of the first w dimensions of a head, (x_i, y_i) = (x_i, x_{i + w/2}), as Llama
and GPT-NeoX do (RoFormer and x-transformers pair neighbours, which only renames dimensions):

    x_i <- x_i cos(p w_i) - y_i sin(p w_i)
    y_i <- y_i cos(p w_i) + x_i sin(p w_i)

Angles and products are float32 or wider whatever the dtype of the model; the codes of Llama and
GPT-NeoX round cosines and sines to that dtype first. Nothing here has parameters: a model trained
as `rope` can be loaded as `pi`, `ntk`, `dynamic-ntk` or `yarn` to read further, which is what those
are for; trained as such from the start, it only has other frequencies.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dape.errors import UserError, check_finite, check_whole
from dape.positions.absolute import frequencies

Query = Float[Tensor, "batch heads length head_dim"]
Key = Float[Tensor, "batch kv_heads length head_dim"]
Positions = Int[Tensor, "... length"]
Frequencies = Float[Tensor, "... pairs"]
Waves = Float[Tensor, "... length pairs"]

# Times the training length: from 512 tokens to the 8,192 at which the DAPE papers evaluate.
FACTOR = 16.0


def turn(x: Query, cos: Waves, sin: Waves) -> Query:
    """Return x with its leading pairs turned, and scaled as cosine and sine are."""
    pairs = cos.shape[-1]
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # all heads alike
    first, second, rest = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(turned, dim=-1).to(x.dtype)


def _check_pairs(width: int) -> None:
    """Raise a `UserError` for a single pair, which would be the fastest and the slowest at once."""
    if width < 4:
        raise UserError(f"turned dimensions={width} must be at least 4")


class RoPE(nn.Module):
    r"""Rotary position embedding: w_i = base^(-2 i / w) (Su et al., 2021, section 3.2.2).

    `fraction` is the part of `head_dim` that turns, w / d: 1 in the paper, 1/4 in GPT-NeoX (Black
    et al., 2022, section 2.1.1), which leaves the other dimensions blind to position.

    Raises:
        UserError: if `fraction` leaves no whole pairs, or for a `base` of 1 or less.
    """

    relative = True

    def __init__(self, head_dim: int, base: float = 10000.0, fraction: float = 1.0) -> None:
        super().__init__()
        check_whole(head_dim=head_dim)
        check_finite(base=base, fraction=fraction)
        self.base, self.width = base, int(head_dim * fraction)
        if not 2 <= self.width <= head_dim or self.width % 2:
            raise UserError(
                f"fraction={fraction} turns {self.width} of head_dim={head_dim} dimensions; it "
                f"must be an even number, from 2 to {head_dim}"
            )
        if base <= 1:
            raise UserError(f"base={base} must be above 1")

    def frequencies(self, positions: Positions, dtype: torch.dtype) -> Frequencies:
        """Return w_i in radians a token, the same at all positions or for each."""
        return frequencies(self.width, self.base, dtype, positions.device)

    def waves(self, positions: Positions, dtype: torch.dtype) -> tuple[Waves, Waves]:
        """Return cosine and sine of the angles `p w_i`."""
        angles = positions[..., None] * self.frequencies(positions, dtype)
        return angles.cos(), angles.sin()

    def forward(self, query: Query, key: Key, positions: Positions) -> tuple[Query, Key]:
        """Return queries and keys turned by their positions."""
        cos, sin = self.waves(positions, torch.promote_types(query.dtype, torch.float32))
        return turn(query, cos, sin), turn(key, cos, sin)


class PositionInterpolation(RoPE):
    r"""Position interpolation: `w_i / factor` (Chen et al., 2023, section 2.3).

    A model trained at length L meets no angle below `factor * L` that is outside its range.

    Raises:
        UserError: for a `factor` below 1.
    """

    def __init__(
        self, head_dim: int, factor: float = FACTOR, base: float = 10000.0, fraction: float = 1.0
    ) -> None:
        super().__init__(head_dim, base, fraction)
        check_finite(1, factor=factor)
        self.factor = factor

    def frequencies(self, positions: Positions, dtype: torch.dtype) -> Frequencies:
        """Return the frequencies of RoPE divided by the factor."""
        return super().frequencies(positions, dtype) / self.factor


class NTK(RoPE):
    r"""NTK-aware interpolation: RoPE of base `base * factor^(w / (w - 2))`.

    The slowest pair turns `factor` times slower, the fastest as before (bloc97, 2023; Peng et al.,
    2024, section 3.1).

    Raises:
        UserError: for a `factor` below 1, or a single pair, which would be both.
    """

    def __init__(
        self, head_dim: int, factor: float = FACTOR, base: float = 10000.0, fraction: float = 1.0
    ) -> None:
        super().__init__(head_dim, base, fraction)
        check_finite(1, factor=factor)
        _check_pairs(self.width)
        self.base = base * factor ** (self.width / (self.width - 2))


class DynamicNTK(RoPE):
    r"""Dynamic NTK: NTK-aware by as much as the length so far asks for, RoPE up to L.

    The token at position p turns with base `base * (1 + factor (l / L - 1))^(w / (w - 2))`, where
    l = max(p + 1, L) is the length at which it was the newest and L = `train_length` (emozilla,
    2023; Peng et al., 2024, section 3.3, where the factor is 1).

    That is what `transformers` computes when it generates token by token with a cache, where
    earlier keys keep the base of their time. Given a whole sequence it turns every token with the
    base for its end instead, and of a padded batch for the end of the longest: so there a logit
    changes with the length, the cache and the neighbours, and here it does not.

    Raises:
        UserError: for a negative `factor`, or a single pair.
    """

    relative = False

    def __init__(
        self,
        head_dim: int,
        train_length: int,
        factor: float = 1.0,
        base: float = 10000.0,
        fraction: float = 1.0,
    ) -> None:
        super().__init__(head_dim, base, fraction)
        check_whole(train_length=train_length)
        check_finite(0, factor=factor)
        _check_pairs(self.width)
        self.train_length, self.factor = train_length, factor

    def frequencies(self, positions: Positions, dtype: torch.dtype) -> Frequencies:
        """Return the frequencies of each position."""
        excess = ((positions + 1).to(dtype) / self.train_length - 1).clamp(min=0)
        base = self.base * (1 + self.factor * excess) ** (self.width / (self.width - 2))
        return frequencies(self.width, base[..., None], dtype, positions.device)


class YaRN(RoPE):
    r"""YaRN: `w_i (1 - r_i + r_i / factor)`, and scores times `attention_factor^2`.

    The ramp r rises from 0 to 1 between the pairs that turn `beta_fast` and `beta_slow` times in
    L = `train_length` tokens (Peng et al., 2024, section 3.2): fast pairs stay, slow ones are
    interpolated. In the paper it is linear in the number of turns; here, as in the authors' code,
    in `transformers` and so in every published model, it is linear in i between whole pairs.

    Cosines and sines carry `attention_factor`, the sqrt(1 / t) of section 3.4 for a softmax at
    temperature t: by default `0.1 ln(factor) + 1`.

    Raises:
        UserError: for a `factor` below 1, or unless `beta_fast > beta_slow > 0`.
    """

    def __init__(
        self,
        head_dim: int,
        train_length: int,
        factor: float = FACTOR,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
        base: float = 10000.0,
        fraction: float = 1.0,
    ) -> None:
        super().__init__(head_dim, base, fraction)
        check_whole(train_length=train_length)
        check_finite(1, factor=factor)
        check_finite(beta_fast=beta_fast, beta_slow=beta_slow)
        if not beta_fast > beta_slow > 0:
            raise UserError(f"beta_fast={beta_fast} > beta_slow={beta_slow} > 0 must hold")
        self.factor = factor
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1
        check_finite(attention_factor=attention_factor)
        self.attention_factor = attention_factor
        first = math.floor(self.pair(train_length / beta_fast))
        last = math.ceil(self.pair(train_length / beta_slow))
        self.first, self.last = max(first, 0), min(last, self.width - 1)

    def pair(self, wavelength: float) -> float:
        """Return the i, not whole, of the pair that turns once in so many tokens."""
        return self.width * math.log(wavelength / (2 * math.pi)) / (2 * math.log(self.base))

    def frequencies(self, positions: Positions, dtype: torch.dtype) -> Frequencies:
        """Return the frequencies of RoPE where they are fast, interpolated where they are slow."""
        plain = super().frequencies(positions, dtype)
        index = torch.arange(len(plain), dtype=dtype, device=plain.device)
        # A ramp between a pair and itself is a step after it.
        ramp = ((index - self.first) / max(self.last - self.first, 0.001)).clamp(0, 1)
        return plain * (1 - ramp) + plain / self.factor * ramp

    def waves(self, positions: Positions, dtype: torch.dtype) -> tuple[Waves, Waves]:
        """Return cosine and sine times the attention factor."""
        cos, sin = super().waves(positions, dtype)
        return cos * self.attention_factor, sin * self.attention_factor


class XPos(RoPE):
    r"""xPos: RoPE whose pairs count less with distance (Sun et al., 2022, section 3).

    Queries carry `z_i^(p / scale_base)` and keys its inverse, z_i = (2 i / w + 0.4) / 1.4, so that
    a pair counts `z_i^(distance / scale_base)`: made for causal attention, as keys after the query
    would count more. The blockwise attention of the paper's longest evaluations is not part of it.

    The scale of keys grows as e^(1.25 p / scale_base): at the default 512 it is e^40 at position
    16,384, and leaves the range of float32 and bfloat16 near 35,000, where scores become NaN. The
    authors' code and x-transformers put the origin in the middle of the sequence to reach twice as
    far: that cancels in the scores, but makes keys depend on the length, so that no cache can hold.

    Raises:
        UserError: for float16, whose range ends near position 4,000, or a `scale_base` below 1.
    """

    def __init__(
        self,
        head_dim: int,
        scale_base: float = 512.0,
        base: float = 10000.0,
        fraction: float = 1.0,
    ) -> None:
        super().__init__(head_dim, base, fraction)
        check_finite(1, scale_base=scale_base)
        self.scale_base = scale_base

    def forward(self, query: Query, key: Key, positions: Positions) -> tuple[Query, Key]:
        """Return queries turned and shrunk, keys turned and grown."""
        if query.dtype == torch.float16:
            raise UserError("xPos overflows float16 near position 4,000; use bfloat16 or float32")
        dtype = torch.promote_types(query.dtype, torch.float32)
        cos, sin = self.waves(positions, dtype)
        pairs = torch.arange(0, self.width, 2, dtype=dtype, device=query.device) / self.width
        scale = ((pairs + 0.4) / 1.4) ** (positions[..., None] / self.scale_base)
        return turn(query, cos * scale, sin * scale), turn(key, cos / scale, sin / scale)


class RandomizedRoPE(RoPE):
    r"""RoPE at randomised positions (Ruoss et al., 2023, section 3).

    In training mode the T tokens take T of the positions 0 .. `pool` - 1, drawn without replacement
    and sorted, anew in every layer and step and shared by the batch, so that distances beyond the
    training length are met. `pool` is four times `train_length` by default, as for language models
    in the DAPE paper; Ruoss et al. take 2,048 for a training length of 40.

    In evaluation mode the positions are used as they are. The authors' code draws there too: its
    results are random, and a draw is for a whole sequence, so that no cache can hold.

    Raises:
        UserError: in training, for more tokens than the pool has positions.
    """

    def __init__(
        self,
        head_dim: int,
        train_length: int,
        pool: int | None = None,
        base: float = 10000.0,
        fraction: float = 1.0,
    ) -> None:
        super().__init__(head_dim, base, fraction)
        check_whole(train_length=train_length)
        self.pool = 4 * train_length if pool is None else pool
        check_whole(pool=self.pool)

    def draw(self, length: int, device: torch.device) -> Positions:
        """Return sorted positions, each at most once."""
        if length > self.pool:
            raise UserError(
                f"{length} tokens do not fit the pool={self.pool} of randomised positions; set "
                "scheme_options.rotation.pool, or a greater train_length"
            )
        return torch.randperm(self.pool, device=device)[:length].sort().values

    def forward(self, query: Query, key: Key, positions: Positions) -> tuple[Query, Key]:
        """Return queries and keys turned by drawn positions in training, else by their own."""
        if self.training:
            positions = self.draw(positions.shape[-1], positions.device)
        return super().forward(query, key, positions)
