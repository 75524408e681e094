r"""Biases: matrices B from the positions of queries and keys, added to the attention scores.

A bias maps positions `[query]` and `[key]` to B `[heads, query, key]`; batch axes may lead.
Positions are arguments, and therefore caches, padding, chunks and sequence parallelism need no code
in a bias. Distances and parameters are float32 or wider in a model of any dtype, because bfloat16
rounds 257 to 256. In bidirectional use, the distance of every bias is `|i - j|`.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding, relu, softplus

from dape.errors import UserError, check_finite, check_whole
from dape.positions.absolute import frequencies
from dape.positions.given import check_exact
from dape.positions.wide import Wide, own_dtypes, parameter, widen, without_overflow


class Bias(Wide):
    """The interface of a bias, `bias(query_positions, key_positions) -> B`.

    `relative = True` says that B depends on the distance `|i - j|` alone. A kernel may then keep B
    as a table over the distance. Otherwise B is computed for every query and key.

    Args:
        num_heads: number of query heads H.
    """

    relative = False

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        check_whole(num_heads=num_heads)
        self.num_heads = num_heads

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return B `[*batch, heads, query, key]`."""
        raise NotImplementedError


def distance(
    query_positions: Int[Tensor, "*batch query"],
    key_positions: Int[Tensor, "*batch key"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*batch 1 query key"]:
    """Return `|i - j|`, exact in float32 up to 2^24, with an axis for the heads."""
    query, key = exact(query_positions), exact(key_positions)
    difference = query[..., :, None] - key[..., None, :]
    return difference.abs().to(torch.promote_types(dtype, torch.float32)).unsqueeze(-3)


def exact(positions: Int[Tensor, "*batch length"]) -> Int[Tensor, "*batch length"]:
    """Return positions whose differences are exact; raise a `UserError` for others."""
    check_exact(positions)
    return without_overflow(positions)


def sinusoids(
    positions: Int[Tensor, "*batch length"], size: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*batch length size"]:
    """Return `sin(i w_f)` for each frequency `w_f = 10000^(-2 f / size)`, then the cosines.

    The angles are float64. In float32 the first angles would be off by a thousandth at position
    16,384.
    """
    angles = positions[..., None] * frequencies(size, 10000.0, torch.float64, positions.device)
    # `stack`, because `vmap` of `cat` fixes the length in a compilation for all lengths.
    return torch.stack((angles.sin(), angles.cos()), dim=-2).flatten(-2).to(dtype)


def per_head(parameter: Float[Tensor, "heads"]) -> Float[Tensor, "heads 1 1"]:
    """Return a parameter of each head in at least float32, with axes for query and key."""
    return widen(parameter)[:, None, None]


def inverse_softplus(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return x with `softplus(x) = value`, for a positive `value`."""
    return value + torch.log(-torch.expm1(-value))


class NoBias(Bias):
    """No bias, B = 0; NoPE of Kazemnejad et al., 2023, if no other place carries position.

    Args:
        num_heads: number of query heads H.
    """

    relative = True

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return zeros, as a view of a single stored zero."""
        batch, query, key = (
            query_positions.shape[:-1],
            query_positions.shape[-1],
            key_positions.shape[-1],
        )
        zero = torch.zeros((), dtype=torch.float32, device=query_positions.device)
        return zero.expand(*batch, self.num_heads, query, key)


class ALiBi(Bias):
    r"""ALiBi: `B_h = -s_h |i - j|` with fixed slopes (Press et al., 2022, section 3).

    If H is a power of two, the slopes are `2^(-8 h / H)`, h = 1..H. Otherwise the slopes of the
    next smaller power of two M come first, then every second slope for 2 M, as in the authors'
    code. The paper has only powers of two.

    Args:
        num_heads: number of query heads H.
    """

    relative = True

    def slopes(self, device: torch.device | None = None) -> Float[Tensor, "heads"]:
        """Return `s_h`, computed in each call to keep the slopes exact when the model is cast."""
        even = 2 ** math.floor(math.log2(self.num_heads))
        index = torch.arange(1, even + 1, dtype=torch.float32, device=device)
        whole, halves = index * (8 / even), (2 * index - 1) * (4 / even)
        return torch.exp2(-torch.cat((whole, halves[: self.num_heads - even])))

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return `-s_h |i - j|`."""
        slopes = self.slopes(query_positions.device)
        return -per_head(slopes) * distance(query_positions, key_positions)


class Kerple(Bias):
    r"""Kerple, logarithmic: `B_h = -p_h log(1 + a_h |i - j|)` (Chi et al., 2022, section 4).

    p, a > 0 are learned for each head and start at p ~ U(0, 2), a ~ U(0, 1), at least 0.01. `a` has
    the unit 1 / token. Softplus keeps p and a positive. The code of the authors and of DAPE clamps
    `.data` at 0.01 in every forward, but sharding and compilation forbid writes to `.data`.

    Args:
        num_heads: number of query heads H.
    """

    relative = True

    def __init__(self, num_heads: int) -> None:
        super().__init__(num_heads)
        self.raw_p = parameter(num_heads)
        self.raw_a = parameter(num_heads)
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
        return softplus(widen(self.raw_p))

    @property
    def a(self) -> Float[Tensor, "heads"]:
        """The inverse length scale of each head, in 1 / token."""
        return softplus(widen(self.raw_a))

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return `-p_h log(1 + a_h |i - j|)`."""
        delta = distance(query_positions, key_positions, self.raw_p.dtype)
        return -per_head(self.p) * torch.log1p(per_head(self.a) * delta)


class KerplePower(Bias):
    r"""Kerple, power: `B_h = -a_h |i - j|^{p_h}` (Chi et al., 2022, section 4).

    a > 0 and 0 < p <= 2 are learned for each head and start at a ~ U(0, 1), at least 0.01, and
    p ~ U(0, 2), from 0.01 to 1.99. Softplus bounds a, and twice a sigmoid bounds p. The authors'
    code clamps `.data` in every forward, as for `Kerple`.

    Args:
        num_heads: number of query heads H.
    """

    relative = True

    def __init__(self, num_heads: int) -> None:
        super().__init__(num_heads)
        self.raw_p = parameter(num_heads)
        self.raw_a = parameter(num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw p and a anew."""
        with torch.no_grad():
            nn.init.uniform_(self.raw_p, 0.01, 1.99)
            self.raw_p.copy_(torch.logit(self.raw_p / 2))
            nn.init.uniform_(self.raw_a, 0.01, 1.0)
            self.raw_a.copy_(inverse_softplus(self.raw_a))

    @property
    def p(self) -> Float[Tensor, "heads"]:
        """The power of each head."""
        return 2 * torch.sigmoid(widen(self.raw_p))

    @property
    def a(self) -> Float[Tensor, "heads"]:
        """The weight of each head."""
        return softplus(widen(self.raw_a))

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return `-a_h |i - j|^{p_h}`."""
        delta = distance(query_positions, key_positions, self.raw_p.dtype)
        here = delta == 0  # where the second derivative of a power by p is NaN
        power = (delta.masked_fill(here, 1) ** per_head(self.p)).masked_fill(here, 0)
        return -per_head(self.a) * power


class T5(Bias):
    r"""T5: `B_h = W[bucket(|i - j|), h]`, W learnable (Raffel et al., 2020, section 2.1).

    With n buckets and e = n // 2, each distance below e has a bucket. Greater distances fall into
    `e + floor((n - e) log(|i - j| / e) / log(max_distance / e))`, at most n - 1.

    - In causal use the buckets are the buckets of T5's decoder. In bidirectional use both sides
      share the n buckets, where T5's encoder gives n / 2 to each side.
    - Every layer has a separate W, where T5 shares the W of the first layer.
    - W starts as N(0, 2 / (n + H)), as in GPT-NeoX. GPT-NeoX then multiplies by `sqrt(head_dim)`.
      transformers draws N(0, 1 / hidden_size).

    Args:
        num_heads: number of query heads H.
        num_buckets: number of buckets n.
        max_distance: distance in tokens from which all keys share the last bucket.

    Raises:
        UserError: for fewer than two buckets, or a `max_distance` of at most `num_buckets // 2`.
    """

    relative = True

    def __init__(self, num_heads: int, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__(num_heads)
        check_whole(2, num_buckets=num_buckets)
        check_whole(max_distance=max_distance)
        if max_distance <= num_buckets // 2:
            raise UserError(
                f"max_distance={max_distance} must be above num_buckets // 2 = {num_buckets // 2}, "
                "the first distance whose bucket is shared"
            )
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.weight = parameter(num_buckets, num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W anew."""
        nn.init.xavier_normal_(self.weight)

    def starts(self, device: torch.device | None = None) -> Float[Tensor, " starts"]:
        """Return the first distance of each bucket except the bucket of 0, in float64.

        A list of Python would be copied from the host, and a CUDA graph holds no such copy.
        """
        exact = self.num_buckets // 2
        shared = self.num_buckets - exact
        how: dict[str, Any] = {"dtype": torch.float64, "device": device}
        powers = torch.logspace(0, 1 - 1 / shared, shared, self.max_distance / exact, **how)
        # In floats a whole power may come out just above the integer.
        first_shared = (powers * (exact * (1 - 1e-12))).ceil()
        return torch.cat((torch.arange(1, exact, **how), first_shared))

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return the entries of W for each distance."""
        delta = distance(query_positions, key_positions).squeeze(-3)
        starts = self.starts(delta.device).to(delta.dtype)
        bucket = torch.bucketize(delta, starts, right=True, out_int32=True)
        return embedding(bucket, widen(self.weight)).movedim(-1, -3)


class Sandwich(Bias):
    r"""Sandwich: `B_h = (H / 8h) sum_f cos((i - j) 10000^(-2 f / d_bar))` (Chi et al., 2023).

    B is the product of two sinusoidal embeddings of width `d_bar`, divided by 8 h / H for head
    h = 1..H, with f = 0 .. d_bar / 2 - 1. Sandwich has no parameters. NeMo counts f from 1 and
    subtracts d_bar / 2. A softmax cannot see the constant, and an adapter can.

    Args:
        num_heads: number of query heads H.
        d_bar: width of the sinusoids, 128 in the paper for every model width.

    Raises:
        UserError: for an odd or non-positive `d_bar`.
    """

    relative = True

    def __init__(self, num_heads: int, d_bar: int = 128) -> None:
        super().__init__(num_heads)
        check_whole(2, d_bar=d_bar)
        if d_bar % 2:
            raise UserError(f"d_bar={d_bar} must be even and positive: sines and cosines")
        self.d_bar = d_bar

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return the compressed inner products."""
        # Positions count from the first key, in float64: a shift of all positions changes nothing.
        query, key = (
            sinusoids(exact(x) - key_positions[..., :1], self.d_bar, torch.float64)
            for x in (query_positions, key_positions)
        )
        product = (query @ key.mT).unsqueeze(-3).to(torch.float32)
        heads = torch.arange(1, self.num_heads + 1, dtype=product.dtype, device=product.device)
        return product * per_head(self.num_heads / (8 * heads))


class FIRE(Bias):
    r"""FIRE: `B_h = f_h(psi(|i - j|) / psi(max(i, L)))`, psi(x) = log(1 + c x).

    Li et al., 2024, section 3. f = W2 relu(w1 x + b1) + b2 has `hidden` units and starts as
    `nn.Linear` does. The threshold L and c > 0 are learned and start at `threshold` and 0.1. With L
    at the training length, no query of the training has a normaliser of its own.

    - The normaliser is psi(max(i, j, L)), equal to the paper's in causal use, where j <= i. In
      bidirectional use, the argument of f stays within [0, 1] on both sides.
    - c and L are stored as logarithms, and a step changes c and L by a factor. The authors' listing
      takes absolute values, and multiplies a fixed L by a learnable factor.
    - f has a ReLU with and without DAPE. DAPE's code has a ReLU or a LeakyReLU. DAPE's
      code also halves the length at which L starts, 128 in its settings for training at 512. The
      listing of Li et al. starts at 512 for training at 2,048.

    FIRE is not `relative`, because B also depends on i.

    Args:
        num_heads: number of query heads H.
        train_length: training length in tokens.
        hidden: number of hidden units of f.
        threshold: start of the threshold L in tokens, `train_length` by default.

    Raises:
        UserError: for a `train_length`, `hidden` or `threshold` below 1.
    """

    def __init__(
        self,
        num_heads: int,
        train_length: int = 512,
        hidden: int = 32,
        threshold: float | None = None,
    ) -> None:
        super().__init__(num_heads)
        check_whole(train_length=train_length, hidden=hidden)
        self.start = train_length if threshold is None else threshold
        check_finite(1, threshold=self.start)
        # Tensors of one element, because sharding takes no scalars.
        self.log_c = parameter(1)
        self.log_threshold = parameter(1)
        self.weight_in = parameter(hidden, 1)
        self.bias_in = parameter(hidden)
        self.weight_out = parameter(num_heads, hidden)
        self.bias_out = parameter(num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set c and L, and draw both layers from U(-1, 1) / sqrt(fan in)."""
        nn.init.constant_(self.log_c, math.log(0.1))
        nn.init.constant_(self.log_threshold, math.log(self.start))
        for weight, bias in ((self.weight_in, self.bias_in), (self.weight_out, self.bias_out)):
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    @property
    def c(self) -> Float[Tensor, "1"]:
        """The inverse length scale of psi, in 1 / token."""
        return widen(self.log_c).exp()

    @property
    def threshold(self) -> Float[Tensor, "1"]:
        """The threshold L in tokens; queries up to L share a normaliser."""
        return widen(self.log_threshold).exp()

    def forward(
        self, query_positions: Int[Tensor, "*batch query"], key_positions: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch heads query key"]:
        """Return f of the normalised distances."""
        delta = distance(query_positions, key_positions, self.log_c.dtype)
        query, key = (
            torch.log1p(self.c * torch.maximum(x.to(delta.dtype), self.threshold))
            for x in (query_positions, key_positions)
        )
        normaliser = torch.maximum(query[..., :, None], key[..., None, :]).unsqueeze(-3)
        ratio = torch.log1p(self.c * delta) / normaliser
        hidden = relu(per_head(self.weight_in[:, 0]) * ratio + per_head(self.bias_in))
        with own_dtypes(hidden.device):
            out = torch.einsum("hc,...cqk->...hqk", widen(self.weight_out), hidden)
        return out + per_head(self.bias_out)
