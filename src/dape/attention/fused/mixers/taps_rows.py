"""Heads mixed by convolutions along the keys for few rows, in Triton and float32: one kernel."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dape.attention.fused import decode, windows
from dape.attention.fused.mixers import taps_rows_kernels as kernels
from dape.attention.fused.mixers.taps import TapsMixer
from dape.attention.fused.plan import start
from dape.attention.fused.problem import Band, Problem
from dape.attention.fused.sizes import WIDE_PRECISION, cdiv, padded
from dape.attention.fused.terms import Taps

# Keys of a program.
KEYS = 64


def serves(problem: Problem) -> bool:
    """Return whether a problem has few queries against many keys, fewer than a tile in CUDA."""
    return decode.serves(problem) and problem.query.shape[2] < windows.ROWS


@dataclass(frozen=True, slots=True)
class TapsRowsMixer(TapsMixer):
    """A mixer of few rows, forward alone, for a scratch in float32.

    Hidden units are computed once for each of their taps, which costs less than further kernels do.
    The `flag`, if there is one, becomes 1, so that the backward pass is in float32 too.
    """

    flag: Int[Tensor, "#1"]

    @classmethod
    def of(cls, problem: Problem, terms: Taps, flag: Tensor) -> "TapsRowsMixer":
        """Return the mixer of a problem, whose scratch is now in float32."""
        in_16_bits = problem.query.dtype != torch.float32
        return cls(problem._replace(in_float32=in_16_bits), terms, flag)

    def mix(self, x: Tensor, band: Band) -> Tensor:
        """Return logits of a band, in a scratch of their own; -inf where unseen."""
        terms, logits, mask = self.terms, torch.empty_like(x), self.mask(x, band)
        started = self.started(mask, band)
        batch, rows, keys = band.sizes
        units, heads = len(terms.hidden_bias), terms.weight_in.shape[1]
        flags = self.problem.in_float32
        start(kernels.rows_mix_kernel, (cdiv(keys, KEYS), rows, batch))(
            x, logits, terms.weight_in, terms.weight_out, terms.hidden, terms.hidden_bias,
            terms.static, mask, started, *self.counted(), self.flag if flags else x,
            rows, keys, band.shift, len(terms.hidden), *x.stride()[:2], mask.stride(0),
            H=heads, D=units, T=terms.taps, HEADS=padded(heads), UNITS=padded(units),
            CAUSAL=self.problem.causal, MASKED=self.problem.mask is not None,
            FLAGS=flags, K=KEYS, PRECISION=WIDE_PRECISION,
            num_warps=4,
        )  # fmt: skip
        return logits
