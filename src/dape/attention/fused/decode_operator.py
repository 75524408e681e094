"""A step of decoding as an operator of PyTorch, without tables in memory.

Tables of U and C over all distances cost more than a query against as many keys. The kernel of
decoding therefore makes U and C where it needs them, from a bias of few parameters.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dape.attention.call import Call
from dape.attention.fused.formed import form_of
from dape.attention.fused.problem import Result, problem_of
from dape.attention.fused.tables import first_column, mixes_scores
from dape.positions.adapter import DAPE
from dape.registered import register, straight

if TYPE_CHECKING:
    from dape.attention.fused import decode


def sources_of(call: Call) -> "decode.Sources | None":
    """Return the sources of the tables of a call, or None if the operator does not serve a call."""
    from dape.attention.fused import decode

    adapter, form = call.adapter, form_of(call.bias)
    if form is None or not mixes_scores(adapter) or not is_small(call, adapter):
        return None
    name, p0, p1, span = form
    layers = adapter.weight_in, adapter.bias_in, adapter.weight_out, adapter.bias_out
    given = (call.query, call.key, call.value, p0, p1, *layers)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        return None
    return decode.Sources(p0, p1, *layers, name, span, first_column(adapter), adapter.residual)


def is_small(call: Call, adapter: DAPE) -> bool:
    """Return whether programs may make tables for the rows, heads and hidden units of a call."""
    from dape.attention.fused import decode

    batch, heads, rows, _ = call.query.shape
    few = batch * rows <= decode.MOST_MADE and call.key.shape[2] >= decode.KEYS_PER_ROW * rows
    fits = heads <= decode.MOST_HEADS and adapter.hidden <= decode.MOST_UNITS
    return few and fits and adapter.kernel_size == 1 and call.result == call.value.dtype


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    offset: int,
    *sources: Any,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of every row."""
    from dape.attention.fused import decode

    problem = problem_of(query, key, value, (), mask, scale, causal, offset)
    found = Result.of(problem, exact=False)
    with torch.cuda.device_of(query):
        decode.forward(problem, decode.Sources(*sources), found)
    return found.out, found.lse


def _fake(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


operator = register(
    "decode_1(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal, "
    "SymInt offset, Tensor? p0, Tensor? p1, Tensor w1, Tensor b1, Tensor w2, Tensor b2, str form, "
    "SymInt span, SymInt on_bias, bool residual) -> (Tensor, Tensor)",
    _decode,
    _fake,
)
decoded = straight(operator, _decode)
