"""The public operator, which checks the arguments and calls a backend."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dape.attention.call import checked
from dape.attention.select import select
from dape.errors import UserError, check_switch


def attention(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    value: Float[Tensor, "batch kv_heads key value_dim"],
    bias: nn.Module | None = None,
    adapter: nn.Module | None = None,
    causal: bool = True,
    scale: float | None = None,
    query_offset: int | Int[Tensor, ""] = 0,
    backend: str = "auto",
    *,
    key_offset: int = 0,
    mask: Bool[Tensor, "batch key"] | Bool[Tensor, "#batch 1 #query key"] | None = None,
    query_positions: Int[Tensor, "*batch query"] | None = None,
    key_positions: Int[Tensor, "*batch key"] | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
) -> (
    Float[Tensor, "batch heads query value_dim"]
    | tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query key"]]
    | tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]
):
    r"""Attention with logits `adapter(scale q k^T, bias(i, j))`, a sum without an adapter.

    Args:
        query: queries `[B, H, Tq, d]`.
        key: keys `[B, Hkv, Tk, d]`; Hkv divides H, and H / Hkv neighbouring query heads share a key
            head.
        value: values `[B, Hkv, Tk, dv]`.
        bias: module from positions to B `[H, Tq, Tk]`, such as `dape.Kerple`; no bias by default.
        adapter: module from scores and bias to logits, such as `dape.DAPE`, or a user's module;
            scores + bias by default.
        causal: whether the query at index i sees only the keys at indices j <= i.
        scale: factor of the scores, `1 / sqrt(d)` by default.
        query_offset: index of the first query, in decoding the number of cached keys.
        backend: `auto` for the fastest backend that serves the call, or `reference`, `chunked`,
            `sdpa`, `triton` or `cuda`; `dape info` lists the state of the backends.
        key_offset: index of the first key, if the keys are a part of all.
        mask: true where a key may be seen: `[B, Tk]` for padding, or `[B or 1, 1, Tq or 1, Tk]`.
        query_positions: positions of the queries `[Tq]` or `[B, Tq]`, by default
            `query_offset + arange(Tq)`.
        key_positions: positions of the keys `[Tk]` or `[B, Tk]`, by default
            `key_offset + arange(Tk)`.
        return_weights: whether to return the softmax weights `[B, H, Tq, Tk]` too, by the backend
            `reference`.
        return_lse: whether to return `lse_i = log sum_j exp(logits_ij)` `[B, H, Tq]` too, in
            float32 or wider, -inf for a query without visible keys. Outputs over parts p of the
            keys merge to the output over all keys, `sum_p exp(lse_p - lse) out_p` with
            `lse = logsumexp_p lse_p`, as in `dape.attention.parallel`. Output and lse are
            differentiable.

    Returns:
        The output `[B, H, Tq, dv]` in the dtype of the value, zeros for a query without visible
        keys.

    Raises:
        UserError: for shapes that do not fit together, or a backend that cannot serve the call.
    """
    check_switch(return_weights=return_weights, return_lse=return_lse)
    if return_weights and return_lse:
        raise UserError(
            "return_weights=True and return_lse=True: a call returns weights or log-sum-exp; "
            "make two calls"
        )
    call = checked(
        query, key, value, bias, adapter, mask, scale, query_positions, key_positions,
        causal, query_offset, key_offset,
    )  # fmt: skip
    wanted = "weights" if return_weights else "lse" if return_lse else None
    found = select(call, backend, wanted).attend(call, lse=return_lse)
    return found.out if wanted is None else (found.out, getattr(found, wanted))
