"""Further arguments of transformers' callers: used, or refused."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from dape.errors import UserError, unknown
from dape.model.conditions import look, refuse

# Releases of transformers name the cache of keys and values by either.
CACHE_NAMES = ("past_key_values", "cache")
# The name in outputs of the release at hand.
CACHE = fields(BaseModelOutputWithPast)[1].name
# The loss takes the first three, and transformers' decorators take the next. Trainers ask the stack
# of blocks, which has no logits, as they ask the language model.
_TAKEN = frozenset(
    {
        "ignore_index",
        "num_items_in_batch",
        "shift_labels",
        "debug_io",
        "debug_io_dir",
        "output_hidden_states",
        "prune_layers",
        "logits_to_keep",
    }
)
# The bounds of documents give the same information.
_IMPLIED = frozenset({"max_length_k", "max_length_q"})
_KNOWN = (
    "attention_mask",
    "cache",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "input_ids",
    "inputs_embeds",
    "labels",
    "output_attentions",
    "past_key_values",
    "position_ids",
    "return_dict",
    "seq_idx",
    "use_cache",
)

UNEQUAL = "cu_seq_lens_q and cu_seq_lens_k must both be given, and be equal"
_SHORT = (
    "attention_mask has fewer columns than cached and new keys: give 1 for every visible key, and"
    " leave prefill_chunk_size out beside a cache"
)
_ENDS = (
    "attention_mask hides the last token of a prompt, and generate goes on from the last token: pad"
    " on the left, as tokenizer.padding_side = 'left' does"
)
_FULL = (
    "past_key_values is a static cache without room for the new keys: give a greater max_cache_len,"
    " or call reset() for another text"
)


def refuse_unused(arguments: Mapping[str, Any], causal: bool) -> None:
    """Raise a `UserError` for an argument whose value the model would ignore.

    `token_type_ids` may be zeros, as tokenizers return zeros unasked, and `is_causal` may be
    `causal`, as the configuration is.
    """
    for name, value in arguments.items():
        if value is None or (value is False and name.startswith("output_")):
            continue
        if name == "is_causal" and value is causal:
            continue
        if name == "token_type_ids":
            refuse(
                look(value.any()),
                "token_type_ids: the model knows only token type 0; leave token_type_ids out",
            )
        elif name not in _TAKEN | _IMPLIED:
            raise unknown("argument of the model", name, _TAKEN.union(_IMPLIED, _KNOWN))


def refuse_pages(*_: Any, **__: Any) -> NoReturn:
    """Raise a `UserError` for continuous batching, whose cache of pages only its kernels read."""
    raise UserError(
        "generate_batch and continuous batching keep the keys of all prompts in pages, which "
        "biases and adapters do not read: pad the prompts on the left, and call generate"
    )


def by_either_name(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache; raise a `UserError` for two, for tuples of tensors or for an encoder's."""
    for each in (past_key_values, cache):
        if not isinstance(each, Cache | None) or isinstance(each, EncoderDecoderCache):
            raise UserError(
                f"past_key_values is a {type(each).__name__}; give a Cache of transformers, such "
                "as DynamicCache()"
            )
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise UserError("past_key_values and cache are two names of one argument: give one of them")
    return past_key_values if cache is None else cache


def check_covered(attention_mask: Tensor, total: int | Tensor) -> None:
    """Raise a `UserError` for a mask of fewer than `total` cached and new keys."""
    refuse(look(attention_mask.shape[1] < total), _SHORT)


def check_fits(cache: Cache, batch: int, total: int | Tensor, keys: int) -> None:
    """Raise a `UserError` for a cache of another batch, or of fewer than `total` keys."""
    refuse(look(total > keys), _FULL)
    stored = next((getattr(each, "keys", None) for each in cache.layers), None)
    if isinstance(stored, Tensor) and stored.ndim == 4 and stored.shape[0] != batch:
        raise UserError(
            f"past_key_values holds keys of {stored.shape[0]} rows, and the call has {batch}: give "
            f"each batch a cache of its own, or call past_key_values.batch_repeat_interleave"
        )


def check_goes_on(inputs: Mapping[str, Any], new: int | None) -> None:
    """Raise a `UserError` for a step of `generate` that would not go on from its cache.

    With `use_cache=False` each step reads all tokens again, behind the keys in the cache. `new` is
    the number of tokens after the cached ones, None if unknown. Below 1, the step would read
    cached tokens again.
    """
    cache = next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)
    if cache is not None and inputs.get("use_cache") is False:
        raise UserError(
            "use_cache=False, of the call or of the configuration, and past_key_values: generate "
            "would read all tokens again behind the cached keys; say use_cache=True, or leave "
            "past_key_values out"
        )
    if cache is not None and new is not None and new < 1:
        raise UserError(
            f"past_key_values holds {int(cache.get_seq_length())} keys, and the given tokens are "
            "no more, though generate takes the given tokens for the whole text: give the cached "
            "and the new tokens, or input_ids of the new tokens with an attention_mask of all"
        )


def check_counted(found: int, counted: int | None) -> None:
    """Raise a `UserError` for a cache that returns other keys than it counts, None if unknown.

    The positions of the queries would be wrong too.
    """
    if counted is not None and found != counted:
        raise UserError(
            f"past_key_values holds {found} keys, and transformers counts {counted} for the mask: "
            "say use_cache=False (with prefix tuning True), leave assistant_model out with sliding "
            "windows, and crop no quantized cache"
        )


def check_last(attention_mask: Tensor | None) -> None:
    """Raise a `UserError` for a prompt that ends in a hidden token, with which it would go on."""
    if attention_mask is not None and attention_mask.ndim == 2:
        refuse(look((attention_mask[:, -1] == 0).any()), _ENDS)


def packed_documents(
    batch: int,
    length: int,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> Tensor | None:
    """Return the number of each token's document, from either form of collators.

    `seq_idx` `[B, T]` changes where a document begins; `cu_seq_lens_q` `[N + 1]` are the N
    documents' bounds among all tokens, row after row, and `cu_seq_lens_k` the bounds of the keys.

    Raises:
        UserError: for shapes that do not fit, and keys with bounds unlike the queries'.
    """
    if seq_idx is not None:
        if seq_idx.shape != (batch, length):
            raise UserError(f"seq_idx {list(seq_idx.shape)} must be [{batch}, {length}]")
        return (seq_idx.diff(prepend=seq_idx[:, :1]) != 0).cumsum(-1)
    if cu_seq_lens_q is None and cu_seq_lens_k is None:
        return None
    if cu_seq_lens_q is None or cu_seq_lens_k is None or cu_seq_lens_q.shape != cu_seq_lens_k.shape:
        raise UserError(UNEQUAL)
    refuse(look((cu_seq_lens_q != cu_seq_lens_k).any()), UNEQUAL)
    wrong = cu_seq_lens_q.ndim != 1 or look(cu_seq_lens_q[-1] != batch * length)
    # A number in the text would be a new compilation for every length.
    last = "the number of tokens" if isinstance(wrong, Tensor) else batch * length
    refuse(wrong, f"cu_seq_lens_q must be a row of bounds with {last} at the end")
    tokens = torch.arange(batch * length, device=cu_seq_lens_q.device)
    return torch.searchsorted(cu_seq_lens_q, tokens, right=True).view(batch, length)
