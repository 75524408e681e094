"""The public operator: arguments checked once, then handed to a backend."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dape.attention.call import checked
from dape.attention.select import select
from dape.errors import UserError


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
    r"""Attention whose logits are `adapter(q k^T * scale, bias(i, j))`, or their sum without one.

    Args:
        query: `[B, H, Tq, d]`.
        key: `[B, Hkv, Tk, d]`, where Hkv divides H; each serves H / Hkv neighbouring query heads.
        value: `[B, Hkv, Tk, dv]`.
        bias: maps positions to `[H, Tq, Tk]`, such as `dape.Kerple`; none adds nothing.
        adapter: maps scores and bias to logits, such as `dape.DAPE`; any module of that form.
        causal: whether the query at index i sees only the keys at indices j <= i.
        scale: factor of the scores, `1 / sqrt(d)` by default.
        query_offset: index of the first query: in decoding, the cached length.
        backend: `auto`, the fastest that serves the call, or `reference`, `chunked`, `sdpa`,
            `triton`, `cuda`; `dape info` says which work here.
        key_offset: index of the first key, where the keys are a part of all.
        mask: true where a key may be seen: `[B, Tk]` for padding, or `[B or 1, 1, Tq or 1, Tk]`.
        query_positions: `query_offset + arange(Tq)` by default; a batch axis may lead.
        key_positions: `key_offset + arange(Tk)` by default; a batch axis may lead.
        return_weights: also return the softmax weights (backend `reference`).
        return_lse: also return `lse_i = log sum_j exp(logits_ij)`, `[B, H, Tq]` in float32 (or
            wider where the query is), -inf for a query that sees no key. Outputs over parts of
            the keys merge to that over all: `sum_p exp(lse_p - lse) out_p`, where
            `lse = logsumexp_p lse_p`. Gradients flow through both. `dape.attention.parallel`
            does it.

    Returns:
        The output `[B, H, Tq, dv]` in the dtype of the value; zeros for a query that sees no key.

    Raises:
        UserError: for shapes that do not fit each other, and for what the backend cannot do.
    """
    if return_weights and return_lse:
        raise UserError(
            "return_weights=True and return_lse=True: a call returns one of them; "
            "the log-sum-exp needs a call of its own"
        )
    call = checked(
        query, key, value, bias, adapter, mask, scale, query_positions, key_positions,
        causal, query_offset, key_offset,
    )  # fmt: skip
    wanted = "weights" if return_weights else "lse" if return_lse else None
    found = select(call, backend, wanted).attend(call, lse=return_lse)
    also = found.weights if return_weights else found.lse
    return found.out if wanted is None or also is None else (found.out, also)
