"""The order of the kernels, forward and backward.

Only the output and the log-sum-exp of every row are kept for the backward pass. The sequence of
kernels is fixed, and no kernel uses atomics. Two passes therefore agree bit for bit. `naive` has
the formulas for every kind of terms.
"""

from typing import Any

import torch
from torch import Tensor

from dape.attention.fused import decode, overflow, static, windows
from dape.attention.fused.bands import balance, scores, softmax_value
from dape.attention.fused.cuda import features, taps
from dape.attention.fused.cuda.mix import CudaMixer
from dape.attention.fused.geometry import Scratch, bands, blocks
from dape.attention.fused.grad import gradients
from dape.attention.fused.mixers import taps_rows
from dape.attention.fused.mixers.features import FeaturesMixer
from dape.attention.fused.mixers.mixed import MixedMixer
from dape.attention.fused.mixers.mixer import Mixer
from dape.attention.fused.mixers.taps import TapsMixer
from dape.attention.fused.mixers.taps_rows import TapsRowsMixer
from dape.attention.fused.problem import Gate, Gradients, Problem, Result
from dape.attention.fused.rows import Rows, in_half
from dape.attention.fused.terms import (
    Features,
    Mixed,
    Nothing,
    Static,
    Taps,
    Terms,
    learned,
    terms_of,
)

# Bands of the wide way of a forward pass. A band more starts three kernels more, in calls without
# wide numbers too.
MOST_BANDS = 8


def mixer_of(problem: Problem, backend: str) -> Mixer[Any]:
    """Return the mixer of a problem that mixes heads.

    CUDA has a mixer for `Mixed`, and for most problems of FIRE and with three taps, all for a
    scratch of two bytes. Triton serves the remaining problems.
    """
    terms, in_cuda = problem.terms, backend == "cuda" and problem.scratch == torch.float16
    if isinstance(terms, Features):
        if in_cuda and features.serves(problem, terms):
            return features.CudaFeaturesMixer.of(problem, terms)
        return FeaturesMixer(problem, terms)
    if isinstance(terms, Taps):
        fast = in_cuda and windows.serves(problem, terms)
        return taps.CudaTapsMixer.of(problem, terms) if fast else TapsMixer(problem, terms)
    assert isinstance(terms, Mixed)
    return CudaMixer(problem, terms) if in_cuda else MixedMixer(problem, terms)


def forward(problem: Problem, backend: str, exact: bool) -> Result:
    """Return the result of a problem, if `exact` with the rounding error of the output.

    The backward pass subtracts dO O by row from all of dS. An error of O is equal for all keys, and
    grows in the sums of tables and weights. If `exact`, P therefore meets V in two parts, and the
    result keeps the rounding error of the output.
    """
    found, terms = Result.of(problem, exact), problem.terms
    narrow = problem.query.dtype != torch.float32
    if isinstance(terms, Nothing | Static):
        static.forward(problem, found)
    elif isinstance(terms, Mixed | Features) and decode.serves(problem):
        # In float32, and with flag 1 backward too.
        found = found._replace(flag=problem.query.new_empty(int(narrow), dtype=torch.int32))
        decode.forward(problem, terms, found)
    elif isinstance(terms, Taps) and taps_rows.serves(problem):
        found = found._replace(flag=problem.query.new_empty(int(narrow), dtype=torch.int32))
        forward_by_bands(TapsRowsMixer.of(problem, terms, found.flag), found.silent())
    elif not narrow:
        forward_by_bands(mixer_of(problem, backend), found)
    else:
        found = found._replace(flag=problem.query.new_empty(1, dtype=torch.int32))
        mixer = mixer_of(problem, backend)
        if not mixer.whole(found):
            overflow.set_flag(found.flag, terms, in_scratch=mixer.static is None)
            forward_by_bands(mixer, found)
        wider, silent = problem._replace(gate=Gate(found.flag, True)), found.silent()
        if isinstance(terms, Mixed) and len(bands(wider)) > MOST_BANDS:
            decode.forward(wider, terms, silent)
        else:
            forward_by_bands(mixer_of(wider, backend), silent)
    return found


def forward_by_bands(mixer: Mixer[Any], found: Result) -> None:
    """Fill the result of a mixer's problem, band by band; too large numbers set a flag, if any."""
    problem, all_bands = mixer.problem, bands(mixer.problem)
    scratch = Scratch.of(problem, all_bands)
    for band in all_bands:
        x, part = scratch.view(band), problem.part(band)
        scores(x, part, flag=found.flag)
        softmax_value(mixer.mix(x, band), part, found.at(band), mixer.static)


def backward(
    problem: Problem,
    backend: str,
    found: Result,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    learns: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v and of the tables in order, of a bias alone if it `learns`.

    Where the flag of the result is 1 the scratch is in float32.
    """
    dtype = problem.query.dtype
    problem = in_half(problem)
    rows = Rows.of(problem, found, grad_out, grad_lse)
    if found.flag.numel():
        ways = [problem._replace(gate=Gate(found.flag, wide)) for wide in (False, True)]
    else:
        ways = [problem]
    into, terms = room_for_gradients(ways, dtype), problem.terms
    given = [table for table in terms if table is not None]
    tables = [torch.empty_like(table) for table in learned(given, learns)]
    if isinstance(terms, Nothing | Static):
        static.backward(problem, rows, into, tables)
    else:
        for way in ways:  # the gates let a single way run
            backward_by_bands(mixer_of(way, backend), rows, into, terms_of(tables))
    return [*into[:3], *tables]


def room_for_gradients(ways: list[Problem], dtype: torch.dtype) -> Gradients:
    """Return room for dQ, dK and dV of either way, and in float32 for sums of several bands."""
    all_bands = [band for way in ways for band in blocks(way)]
    query, key, value = (torch.empty_like(x, dtype=dtype) for x in ways[0][:3])
    results = query, key, value
    if any(band.summed for band in all_bands):
        key, value = (torch.empty_like(x, dtype=torch.float32) for x in (key, value))
    cut = [band.sizes[:2] for band in all_bands if not band.last]
    if cut:
        elements, rows = map(max, zip(*cut, strict=True))
        heads, size = query.shape[1], query.shape[3]
        query = query.new_empty(elements, heads, rows, size, dtype=torch.float32)
    return Gradients(*results, sums=(query, key, value))


def backward_by_bands(mixer: Mixer[Any], rows: Rows, into: Gradients, tables: Terms) -> None:
    """Fill dQ, dK and dV block by block of the bands, and the gradients of tables and weights."""
    problem, all_bands = mixer.problem, blocks(mixer.problem)
    scratch, other = (Scratch.of(problem, all_bands) for _ in range(2))
    slots = mixer.slots()
    for band in all_bands:
        x, y = scratch.view(band), other.view(band)
        part, its = problem.part(band), rows.at(band)
        scores(x, part, y, its)
        if problem.scratch == torch.float32:
            balance(mixer.mix(x, band), y, part, its, mixer.static)
            scores(x, part)
        x, y = mixer.mix_backward(x, y, band, its, slots)
        gradients(x, y, part, its, into.of_queries(band), *into.of_keys(band))
    mixer.gradients(slots, rows.unit, tables)
