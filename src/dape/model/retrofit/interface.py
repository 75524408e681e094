"""`dape.attention` as an attention of transformers: the attention function and the mask function.

A model calls the mask function once and gives the result to every layer. The layer gives the result
to the attention function. Our mask function returns a `LayerMask` instead of a mask tensor. Padding
then stays `[batch, keys]` and causality stays an argument, and the fused kernels serve the call.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface
from transformers.utils import is_tracing, logging

from dape.attention import attention
from dape.errors import UserError
from dape.model.arguments import check_counted, check_covered
from dape.model.blocks import in_use
from dape.model.conditions import assumed, look, refuse
from dape.model.masking import (
    REACHES,
    count_within,
    documents_of_keys,
    has_gaps,
    moved,
    positions_of_keys,
)
from dape.model.retrofit.asked import asked, offset_of

NAME = "dape"
APART = (
    "position_ids or attention_mask place tokens otherwise apart than indices, by which biases and "
    "adapters in a compiled model go: call the model without torch.compile"
)
logger = logging.get_logger(__name__)


class LayerMask(NamedTuple):
    """The visible keys of the queries of a layer, and the offsets of queries and keys.

    `mask`, `causal` and `query_offset` are as in `dape.attention`. `key_offset` counts the tokens
    dropped by a sliding cache before the first key. `placed` holds the positions of the dropped
    tokens and the keys, and is None for the indices. `moved` says whether positions lie otherwise
    apart than indices, and `gaps` whether hidden tokens lie between visible tokens; both are
    tensors while nobody can look. `packed` says whether a row holds several documents,
    `weights` whether softmax weights are returned. `rows` and `keys` count the queries and keys.
    """

    mask: Tensor | None
    causal: bool
    query_offset: int | Tensor
    key_offset: int = 0
    placed: Tensor | None = None
    moved: bool | Tensor = False
    gaps: bool | Tensor = False
    packed: bool = False
    weights: bool = False
    rows: int = 0
    keys: int = 0

    def __getitem__(self, index: Any) -> Any:
        """Return the mask of the queries that a slice of `[B, 1, Tq, Tk]` names.

        Gemma 4 computes layers that share keys for the last queries alone.
        """
        if not isinstance(index, tuple):
            return tuple.__getitem__(self, index)
        start, stop, _ = index[2].indices(self.rows)
        mask = self.mask if self.mask is None or self.mask.ndim == 2 else self.mask[index]
        return self._replace(mask=mask, query_offset=self.query_offset + start, rows=stop - start)

    @property
    def ndim(self) -> int:
        """Return zero, because Falcon adds ALiBi to masks of four axes."""
        return 0

    def to(self, *_: Any) -> "LayerMask":
        """Return the mask unchanged, because MPT casts masks to booleans."""
        return self

    def positions(
        self, rows: int, keys: int, device: torch.device
    ) -> tuple[Int[Tensor, "*batch rows"], Int[Tensor, "*batch keys"]]:
        """Return the positions of queries and keys."""
        index = torch.arange(keys, device=device) + self.key_offset
        query_index = torch.arange(rows, device=device) + (self.query_offset + self.key_offset)
        if self.placed is None:
            return query_index, index
        return self.placed[:, query_index], self.placed[:, index]


def layer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Bool[Tensor, "batch seen"] | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> LayerMask:
    """Return the mask of a layer, from the arguments of a mask function of transformers.

    Sliding windows shorter than the keys, packed sequences and further patterns become a whole mask
    `[B, 1, Tq, Tk]`. Causality and padding need no whole mask.

    Raises:
        UserError: for documents packed in a row behind cached keys, or a mask without the new keys.
    """
    if attention_mask is not None:
        check_covered(attention_mask, q_offset + q_length)
    asks = asked()
    documents, positions = asks.documents, asks.positions
    tokens = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if tokens is not None and not is_tracing(tokens) and tokens.all():
        tokens = None
    wide = allow_is_causal_skip and local_size is not None and kv_length < local_size
    mask = None if tokens is None else tokens[:, kv_offset : kv_offset + kv_length]
    causal = allow_is_causal_skip
    if wide or mask_function is causal_mask_function:
        causal = True
    else:
        mask = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, tokens,
            allow_is_causal_skip=False, **kwargs,
        )  # fmt: skip
    gaps: bool | Tensor = False if tokens is None else look(has_gaps(tokens))
    apart: bool | Tensor = False
    placed: Tensor | None = None
    if documents is not None:
        documents = documents_of_keys(documents, kv_offset + kv_length, q_offset)
        same = same_document(documents, q_length, kv_offset)
        mask = same if mask is None else same & (mask[:, None, None] if mask.ndim == 2 else mask)
        placed, apart = count_within(documents, tokens), gaps
        if positions is not None:
            shown = documents >= 0 if tokens is None else tokens
            placed = positions_of_keys(shown, positions, q_length, q_offset)
            apart = look(has_gaps(shown) | moved_within(documents, placed, shown))
    elif tokens is not None or positions is not None:
        if positions is not None and tokens is None:
            tokens = positions.new_ones(1, kv_offset + kv_length, dtype=torch.bool)
        placed = positions_of_keys(tokens, positions, q_length, q_offset)
        apart = look(moved(placed, tokens))
    # A static cache updates its tensor in place; the difference is a new tensor.
    return LayerMask(
        mask, causal, q_offset - kv_offset, kv_offset, placed, assumed(apart), gaps,
        documents is not None, asks.weights, q_length, kv_length,
    )  # fmt: skip


def same_document(
    documents: Int[Tensor, "*batch keys"], rows: int, key_offset: int = 0
) -> Bool[Tensor, "*batch 1 rows shown"]:
    """Return whether the first queries and the keys from `key_offset` share a document."""
    return (documents[:, :rows, None] == documents[:, None, key_offset:])[:, None]


def moved_within(
    documents: Int[Tensor, "#batch keys"],
    placed: Int[Tensor, "#batch keys"],
    shown: Bool[Tensor, "#batch keys"],
) -> Bool[Tensor, ""]:
    """Return whether neighbours of a document are not as far apart as indices, as a tensor."""
    same = documents.diff(prepend=documents[:, :1] - 1) == 0
    steps = placed.diff(prepend=placed[:, :1])
    return (same & shown & shown.roll(1, -1) & (steps != 1)).any()


def layer_mask_of(
    attention_mask: LayerMask | Tensor | None,
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
) -> LayerMask:
    """Return the mask of a layer; a tensor is the mask of the caller, and documents stay apart.

    Raises:
        UserError: for a tensor that is not boolean, or a mask of fewer or more keys than there are.
    """
    rows, keys = query.shape[2], key.shape[2]
    if isinstance(attention_mask, LayerMask):
        check_counted(keys, attention_mask.keys)
        return attention_mask
    offset = offset_of(asked().written, rows, keys)
    if attention_mask is None:
        return LayerMask(None, True, offset)
    if attention_mask.dtype != torch.bool:
        raise UserError(
            f"attention_mask {list(attention_mask.shape)} of {attention_mask.dtype}: with adapters "
            "mounted a mask of four axes must be torch.bool, true where a key may be seen"
        )
    if (documents := asked().documents) is not None:
        documents = documents_of_keys(documents, keys, offset)
        attention_mask = attention_mask & same_document(documents, rows)
    return LayerMask(attention_mask, False, offset)


def attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    value: Float[Tensor, "batch kv_heads key value_dim"],
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float | int = 0.0,
    softcap: float | None = None,
    output_attentions: bool | None = False,
    by_index: bool = False,
    **more: Any,
) -> tuple[
    Float[Tensor, "batch query heads value_dim"], Float[Tensor, "batch heads query key"] | None
]:
    """Return the output of `dape.attention` with the bias and adapter of `module`.

    The weights are returned if asked for, and with the backend `reference`. Attention
    dropout is not applied, because the fused kernels have no dropout. With `by_index` a relative
    bias counts hidden tokens too.

    Raises:
        UserError: without a mounted adapter, for a bias without `relative` at unknown positions,
            for bidirectional attention, or for packed documents without a mask in between.
    """
    if not hasattr(module, "adapter"):
        if asked().whose is not None:  # a call of a model with adapters
            raise UserError(
                f"{type(module).__name__} has no adapter, as a cross-attention, which a call with "
                "tokens alone does not reach: leave out encoder_hidden_states and images, or "
                "unmount the adapters"
            )
        raise UserError(
            f"attn_implementation={NAME!r}: the model has no mounted adapters, as a reference "
            "model that a trainer loads by name; mount adapters by dape.load_adapters, or give the "
            "trainer ref_model=copy.deepcopy(model)"
        )
    if dropout and not torch.compiler.is_compiling():  # which cannot warn
        logger.warning_once(f"attention dropout {dropout} is not applied with adapters mounted")
    wide = query.dtype == torch.float64  # which autocast leaves alone, in PyTorch's own too
    if torch.is_autocast_enabled(query.device.type) and not wide:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    adapter: nn.Module | None = in_use(module.adapter)
    bias: nn.Module | None = in_use(getattr(module, "position_bias", None))
    backend: str = getattr(module, "attention_backend", "auto")
    seen = layer_mask_of(attention_mask, query, key)
    given = isinstance(attention_mask, Tensor)
    if getattr(adapter, "reach", 0):
        refuse(look(has_gaps(attention_mask)) if given else seen.gaps, REACHES)
    if softcap is not None:
        adapter = SoftCapped(adapter, softcap)
    refuse_unused(seen, **more)
    positions: tuple[Tensor | None, Tensor | None] = None, None
    absolute = bias is not None and not getattr(bias, "relative", False)
    if absolute:
        check_known(seen, bias, query.shape[2], given)
    reads = bias is not None or getattr(adapter, "needs_rows", False)
    if reads and isinstance(seen.moved, Tensor) and not (absolute or by_index):
        refuse(seen.moved, APART)
    if absolute or (seen.moved is True and not by_index):
        positions = seen.positions(query.shape[2], key.shape[2], query.device)
    weighted = bool(output_attentions) or seen.weights or backend == "reference"
    out = attention(
        query, key, value, bias, adapter,
        causal=seen.causal, scale=scaling, query_offset=seen.query_offset,
        backend="auto" if weighted else backend, mask=seen.mask,
        query_positions=positions[0], key_positions=positions[1], return_weights=weighted,
    )  # fmt: skip
    out, weights = out if isinstance(out, tuple) else (out, None)
    return out.transpose(1, 2).contiguous(), weights


def refuse_unused(
    seen: LayerMask,
    is_causal: bool | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> None:
    """Refuse arguments of a model's forward without an effect on the mask.

    Raises:
        UserError: for `is_causal=False`, or packed documents without a mask in between.
    """
    if is_causal is False:
        raise UserError("is_causal=False: with adapters mounted attention is causal; unmount first")
    if seen.packed or not seen.causal:
        return
    if (cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2) or (
        seq_idx is not None and seq_idx.any()
    ):
        raise UserError(
            "seq_idx and cu_seq_lens_q separate documents in a call of a model with adapters "
            "mounted, not of a layer; give the layer a boolean attention_mask [batch, 1, queries, "
            "keys]"
        )


def check_known(seen: LayerMask, bias: nn.Module | None, rows: int, given: bool) -> None:
    """Raise a `UserError` unless causality, padding and documents give the positions.

    A mask of four axes that is `given` hides the padding before a single query too.
    """
    if given or (rows > 1 and not seen.causal and not seen.packed):
        raise UserError(
            f"{type(bias).__name__} depends on more than the distance, and packed sequences or a "
            "mask of four axes begin anywhere; take a relative bias, such as kerple"
        )


class SoftCapped(nn.Module):
    """An adapter, or none, behind Gemma 2's cap of the scores: `adapter(c tanh(A / c), B)`."""

    def __init__(self, adapter: nn.Module | None, cap: float) -> None:
        super().__init__()
        self.adapter, self.cap = adapter, cap
        self.needs_rows = getattr(adapter, "needs_rows", False)

    def forward(
        self,
        scores: Float[Tensor, "batch heads query key"],
        bias: Float[Tensor, "*#batch heads query key"],
        *rows: Any,
    ) -> Float[Tensor, "batch heads query key"]:
        """Return the logits."""
        capped = self.cap * torch.tanh(scores / self.cap)
        return capped + bias if self.adapter is None else self.adapter(capped, bias, *rows)


# An attention without a mask function silently loses causality.
AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, layer_mask)
