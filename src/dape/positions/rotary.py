r"""Rotations: queries and keys turned by position, which makes scores depend on the distance.

A rotation maps queries `[B, H, T, d]`, keys `[B, Hkv, T, d]` and positions `[T]` or `[B, T]` to
queries and keys. A rotation turns pairs of the first w dimensions of a head,
`(x_i, y_i) = (x_i, x_{i + w/2})`, as in Llama and GPT-NeoX. RoFormer and x-transformers pair
neighbours, with the same result after renaming dimensions. Pair i at position p becomes

    x_i <- x_i cos(p w_i) - y_i sin(p w_i)
    y_i <- y_i cos(p w_i) + x_i sin(p w_i)

Angles and products are float32 or wider in a model of any dtype, where Llama and GPT-NeoX round
cosines and sines to the dtype of the model. Rotations have no parameters. A model trained as `rope`
can be loaded as `pi`, `ntk`, `dynamic-ntk` or `yarn`, to read longer sequences.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dape.errors import UserError, check_finite, check_whole
from dape.positions.absolute import frequencies
from dape.positions.given import check_positions
from dape.positions.turn import Waves, turn
from dape.positions.wide import without_overflow

Query = Float[Tensor, "batch heads length head_dim"]
Key = Float[Tensor, "batch kv_heads length head_dim"]
Positions = Int[Tensor, "... length"]
Frequencies = Float[Tensor, "... pairs"]

# Times the training length: from 512 tokens to the 8,192 at which the DAPE papers evaluate.
FACTOR = 16.0


def _check_pairs(width: int) -> None:
    """Raise a `UserError` for a single pair, the fastest and the slowest at once."""
    if width < 4:
        raise UserError(f"turned dimensions={width} must be at least 4")


class RoPE(nn.Module):
    r"""Rotary position embedding: w_i = base^(-2 i / w) (Su et al., 2021, section 3.2.2).

    Args:
        head_dim: width d of a head.
        base: base of the frequencies.
        fraction: turned fraction w / d of a head, 1 in the paper and 1/4 in GPT-NeoX (Black et al.,
            2022, section 2.1.1); the remaining dimensions carry no position.

    Raises:
        UserError: if `fraction` leaves no whole pairs, for a `base` of 1 or less, or in a call for
            heads of another width or positions of other tokens.
    """

    relative = True

    def __init__(self, head_dim: int, base: float = 10000.0, fraction: float = 1.0) -> None:
        super().__init__()
        check_whole(head_dim=head_dim)
        check_finite(base=base, fraction=fraction)
        self.base, self.head_dim, self.width = base, head_dim, int(head_dim * fraction)
        if not 2 <= self.width <= head_dim or self.width % 2:
            raise UserError(
                f"fraction={fraction} turns {self.width} of head_dim={head_dim} dimensions; take "
                f"a fraction that turns an even number, from 2 to {head_dim}"
            )
        if base <= 1:
            raise UserError(f"base={base} must be above 1")

    def frequencies(self, positions: Positions, dtype: torch.dtype) -> Frequencies:
        """Return w_i in radians a token, `[pairs]` or `[*positions, pairs]`."""
        return frequencies(self.width, self.base, dtype, positions.device)

    def waves(self, positions: Positions, dtype: torch.dtype) -> tuple[Waves, Waves]:
        """Return cosine and sine of the angles `p w_i`."""
        angles = positions[..., None] * self.frequencies(positions, dtype)
        return angles.cos(), angles.sin()

    def forward(self, query: Query, key: Key, positions: Positions) -> tuple[Query, Key]:
        """Return queries and keys turned by position, with shapes and dtypes unchanged."""
        self.check(query, key, positions)
        return self.angles(positions, query.dtype).turn(query, key)

    def check(self, query: Query, key: Key, positions: Positions) -> None:
        """Raise a `UserError` for heads of another width, or positions of other tokens."""
        for name, x in (("query", query), ("key", key)):
            if x.ndim != 4 or x.shape[3] != self.head_dim:
                raise UserError(
                    f"the {name} {list(x.shape)} must be [batch, heads, length, head_dim] with "
                    f"head_dim={self.head_dim}"
                )
            check_positions(positions, x.shape[0], x.shape[2], f"positions of the {name}")

    def angles(self, positions: Positions, dtype: torch.dtype) -> "Angles":
        """Return the angles for queries and keys of a dtype."""
        return Angles(*self.waves(positions, wide_of(dtype)))


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of a forward pass, which layers with the same rotation share.

    FSDP rounds tensors among the arguments of a layer to 16 bits, and leaves other objects alone.
    """

    cos: Waves
    sin: Waves

    def turn(self, query: Query, key: Key) -> tuple[Query, Key]:
        """Return queries and keys turned, on any device."""
        cos, sin = self.cos.to(query.device), self.sin.to(query.device)
        return turn(query, cos, sin), turn(key, cos, sin)


def angles_of(
    rotation: nn.Module | None, positions: Positions, dtype: torch.dtype
) -> Angles | None:
    """Return the angles of a rotation that turns keys as queries, by the positions alone."""
    if isinstance(rotation, RoPE) and type(rotation).forward is RoPE.forward:
        return rotation.angles(positions, dtype)
    return None


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of angles: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class PositionInterpolation(RoPE):
    r"""Position interpolation: `w_i / factor` (Chen et al., 2023, section 2.3).

    A model trained at length L meets no new angle up to `factor * L` tokens.

    Args:
        head_dim: width d of a head.
        factor: length to read, as a multiple of the training length.
        base: base of the frequencies.
        fraction: turned fraction of a head.

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
        """Return the frequencies of RoPE, divided by the factor as far as the ramp says."""
        plain = super().frequencies(positions, dtype)
        ramp = self.ramp(plain)
        return plain * (1 - ramp) + plain / self.factor * ramp

    def ramp(self, plain: Frequencies) -> Frequencies:
        """Return how far each pair is interpolated, from 0 to 1; here every pair is in full."""
        return torch.ones_like(plain)


class NTK(RoPE):
    r"""NTK-aware interpolation: RoPE of base `base * factor^(w / (w - 2))`.

    The slowest pair turns `factor` times slower, and the fastest pair as before (bloc97, 2023; Peng
    et al., 2024, section 3.1).

    Args:
        head_dim: width d of a head.
        factor: length to read, as a multiple of the training length.
        base: base of the frequencies of RoPE.
        fraction: turned fraction of a head.

    Raises:
        UserError: for a `factor` below 1, or a single pair (w = 2).
    """

    def __init__(
        self, head_dim: int, factor: float = FACTOR, base: float = 10000.0, fraction: float = 1.0
    ) -> None:
        super().__init__(head_dim, base, fraction)
        check_finite(1, factor=factor)
        _check_pairs(self.width)
        self.base = base * factor ** (self.width / (self.width - 2))


class DynamicNTK(RoPE):
    r"""Dynamic NTK: NTK-aware interpolation with a factor that grows with the length, RoPE up to L.

    The token at position p turns with base `base * (1 + factor (l / L - 1))^(w / (w - 2))`, where
    l = max(p + 1, L) and L = `train_length` (emozilla, 2023; Peng et al., 2024, section 3.3, where
    the factor is 1).

    `transformers` computes the same in token-by-token generation with a cache, because earlier keys
    keep their base. For a whole sequence, `transformers` turns every token with the base of the
    last token, and of the longest sequence in a padded batch. Logits of `transformers` therefore
    change with length, cache and batch. Logits of this class do not.

    Args:
        head_dim: width d of a head.
        train_length: training length L in tokens.
        factor: growth of the base past L.
        base: base of the frequencies up to L.
        fraction: turned fraction of a head.

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
        excess = ((without_overflow(positions) + 1).to(dtype) / self.train_length - 1).clamp(min=0)
        base = self.base * (1 + self.factor * excess) ** (self.width / (self.width - 2))
        return frequencies(self.width, base[..., None], dtype, positions.device)


class YaRN(PositionInterpolation):
    r"""YaRN: `w_i (1 - r_i + r_i / factor)`, and scores times `attention_factor^2`.

    The ramp r rises from 0 to 1 between the pairs that turn `beta_fast` and `beta_slow` times in
    `train_length` = L tokens (Peng et al., 2024, section 3.2). Fast pairs stay, and slow pairs are
    interpolated. In the paper the ramp is linear in the number of turns. In this class the ramp is
    linear in i between whole pairs, as in the authors' code, in `transformers` and in every
    published model.

    Args:
        head_dim: width d of a head.
        train_length: training length L in tokens.
        factor: length to read, as a multiple of the training length.
        beta_fast: turns in L tokens from which a pair stays unchanged.
        beta_slow: turns in L tokens up to which a pair is interpolated in full.
        attention_factor: factor of cosines and sines, the sqrt(1 / t) of section 3.4 for a softmax
            at temperature t; `0.1 ln(factor) + 1` by default.
        base: base of the frequencies of RoPE.
        fraction: turned fraction of a head.

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
        super().__init__(head_dim, factor, base, fraction)
        check_whole(train_length=train_length)
        check_finite(beta_fast=beta_fast, beta_slow=beta_slow)
        if not beta_fast > beta_slow > 0:
            raise UserError(f"beta_fast={beta_fast} > beta_slow={beta_slow} > 0 must hold")
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1
        check_finite(attention_factor=attention_factor)
        self.attention_factor = attention_factor
        first = math.floor(self.pair(train_length / beta_fast))
        last = math.ceil(self.pair(train_length / beta_slow))
        self.first, self.last = max(first, 0), min(last, self.width - 1)

    def pair(self, wavelength: float) -> float:
        """Return the fractional index of the pair that turns once in `wavelength` tokens."""
        return self.width * math.log(wavelength / (2 * math.pi)) / (2 * math.log(self.base))

    def ramp(self, plain: Frequencies) -> Frequencies:
        """Return the ramp over the index of a pair; a ramp of no width is a step."""
        index = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
        return ((index - self.first) / max(self.last - self.first, 0.001)).clamp(0, 1)

    def waves(self, positions: Positions, dtype: torch.dtype) -> tuple[Waves, Waves]:
        """Return cosine and sine times the attention factor."""
        cos, sin = super().waves(positions, dtype)
        return cos * self.attention_factor, sin * self.attention_factor


class Llama3(PositionInterpolation):
    r"""Llama 3.1's RoPE: `w_i (1 - r_i + r_i / factor)`, with a ramp in the number of turns.

    A pair turns n_i = L w_i / 2 pi times in `train_length` = L tokens. The ramp is
    `r_i = (high_freq_factor - n_i) / (high_freq_factor - low_freq_factor)`, within 0 and 1 (code of
    the Llama 3.1 models; Llama Team, 2024). The ramp is YaRN's of Peng et al., 2024, section 3.2,
    with a steeper slope, and scores keep their temperature. Names of arguments are those of the
    published configurations.

    Args:
        head_dim: width d of a head.
        train_length: training length L in tokens.
        factor: length to read, as a multiple of the training length; 8 in Llama 3.1.
        low_freq_factor: turns in L tokens up to which a pair is interpolated in full.
        high_freq_factor: turns in L tokens from which a pair stays unchanged.
        base: base of the frequencies of RoPE, 500,000 in Llama 3.
        fraction: turned fraction of a head.

    Raises:
        UserError: for a `factor` below 1, or unless `high_freq_factor > low_freq_factor > 0`.
    """

    def __init__(
        self,
        head_dim: int,
        train_length: int,
        factor: float = FACTOR,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
        base: float = 10000.0,
        fraction: float = 1.0,
    ) -> None:
        super().__init__(head_dim, factor, base, fraction)
        check_whole(train_length=train_length)
        check_finite(low_freq_factor=low_freq_factor, high_freq_factor=high_freq_factor)
        if not high_freq_factor > low_freq_factor > 0:
            raise UserError(
                f"high_freq_factor={high_freq_factor} > low_freq_factor={low_freq_factor} > 0 must"
                " hold"
            )
        self.train_length = train_length
        self.low_freq_factor, self.high_freq_factor = low_freq_factor, high_freq_factor

    def ramp(self, plain: Frequencies) -> Frequencies:
        """Return the ramp over the turns of a pair in the training length."""
        turns = self.train_length / (2 * math.pi) * plain
        width = self.high_freq_factor - self.low_freq_factor
        return ((self.high_freq_factor - turns) / width).clamp(0, 1)


class XPos(RoPE):
    r"""xPos: RoPE whose pairs count less with distance (Sun et al., 2022, section 3).

    Queries carry `z_i^(p / scale_base)` and keys the inverse, z_i = (2 i / w + 0.4) / 1.4. The
    weight of a pair is then `z_i^(distance / scale_base)`. xPos is made for causal attention,
    because later keys would have weights above 1. The paper evaluates the longest sequences with
    blockwise attention, absent from this class.

    The scale of keys grows as e^(1.25 p / scale_base). At the default 512 the scale is e^40 at
    position 16,384, and overflows float32 and bfloat16 near 35,000, where scores become NaN. The
    authors' code and x-transformers put the origin in the middle of the sequence and reach twice as
    far. Keys then depend on the length, and a cache is impossible.

    Args:
        head_dim: width d of a head.
        scale_base: distance in tokens over which a pair fades by z_i.
        base: base of the frequencies.
        fraction: turned fraction of a head.

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
        self.check(query, key, positions)
        dtype = wide_of(query.dtype)
        cos, sin = self.waves(positions, dtype)
        pairs = torch.arange(0, self.width, 2, dtype=dtype, device=query.device) / self.width
        scale = ((pairs + 0.4) / 1.4) ** (positions[..., None] / self.scale_base)
        return turn(query, cos * scale, sin * scale), turn(key, cos / scale, sin / scale)


class RandomizedRoPE(RoPE):
    r"""RoPE at randomised positions (Ruoss et al., 2023, section 3).

    In training mode, T tokens take T of the positions 0 .. `pool` - 1, drawn without replacement
    and sorted. Every layer and step draws anew, and the batch shares the draw. Training thus meets
    distances beyond the training length.

    In evaluation mode the positions stay as given. The authors' code draws in evaluation too.
    Results of the authors' code are random, and a cache is impossible, because a draw covers a
    whole sequence.

    Args:
        head_dim: width d of a head.
        train_length: training length in tokens.
        pool: number of positions to draw from, 4 `train_length` by default, as in the language
            models of the DAPE paper; Ruoss et al. take 2,048 for a training length of 40.
        base: base of the frequencies.
        fraction: turned fraction of a head.

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
        """Return queries and keys, turned in training by drawn positions."""
        if self.training:
            positions = self.draw(positions.shape[-1], positions.device)
        return super().forward(query, key, positions)
