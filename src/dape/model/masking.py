"""Mask, positions and offset of the queries and keys of a forward pass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache
from transformers.utils import is_tracing

from dape.attention.context_parallel import ContextParallel
from dape.errors import UserError
from dape.model.arguments import CACHE_NAMES, check_covered, check_fits
from dape.model.conditions import assumed, look, refuse, unchecked

REACHES = (
    "attention_mask hides tokens between visible tokens, and the adapter convolves over"
    " neighbouring keys: put the hidden tokens of a row before the visible ones, or leave"
    " them out"
)
COMPILED = (
    "attention_mask hides tokens between visible tokens, and a compiled model counts them: give"
    " position_ids too"
)
_VALUES = (
    "attention_mask has values other than 1 for visible and 0 for hidden keys: in place of an"
    " additive mask of zeros and -inf give mask == 0, and number documents by seq_idx"
)


def masking(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    documents: Tensor | None,
    *,
    relative: bool,
    reach: int = 0,
) -> dict[str, Any]:
    """Return mask, causality, positions and offset of the queries, and the number of keys.

    All but the number are arguments of `dape.attention`.

    `documents` `[B, T]` numbers the documents packed in a row. Without `documents` and without a
    mask, a document begins where `position_ids` do not increase by 1, as in transformers.

    Positions stay None if neither padding nor documents move positions. The position of a token
    then equals the index. A scheme with `relative` parts then keeps biases without a batch axis,
    also beside padding, unless the mask has gaps. Beside gaps, positions count from the index of
    the first visible token. Cached keys without `position_ids` count back from the first visible
    query.
    `reach` is the reach of the adapter along the keys.

    Raises:
        UserError: for arguments that do not fit together.
    """
    rows = keys = hidden_states.shape[1]
    past: int | Tensor = 0
    if cache is not None:
        past = keys_before(cache)
        keys = cache.get_mask_sizes(rows, 0)[0]
    batch = hidden_states.shape[0]
    mask = None if attention_mask is None else visible_keys(attention_mask, batch, rows, keys, past)
    if cache is not None:
        check_fits(cache, batch, past + rows, keys)
    causal = mask is None or mask.ndim == 2  # a mask of every query replaces causality
    padding = mask if mask is not None and mask.ndim == 2 else None
    gaps: bool | Tensor = False
    if mask is not None and (reach or (causal and relative and position_ids is None)):
        gaps = look(has_gaps(mask))
        if reach:
            refuse(gaps, REACHES)
        gaps = assumed(gaps)
        if isinstance(gaps, Tensor):
            refuse(gaps, COMPILED)
    index = torch.arange(rows, device=hidden_states.device) + past
    if documents is not None:
        documents = documents_of_keys(documents, keys, past)
        if position_ids is None and not relative:
            shown = None if padding is None else padding[:, :rows]
            position_ids = count_within(documents[:, :rows], shown)
    query_positions = key_positions = None
    if position_ids is not None or gaps is True or not (relative or padding is None):
        if position_ids is not None:
            check_positions(position_ids, batch, rows, past)
        tokens = hidden_states.new_ones(1, keys, dtype=torch.bool) if padding is None else padding
        key_positions = positions_of_keys(tokens, position_ids, rows, past)
        if relative and position_ids is None:
            key_positions = key_positions + first_visible(tokens)
        query_positions = key_positions[:, index]
        if position_ids is not None and mask is None and documents is None:
            documents = documents_of_positions(key_positions, past)
    if documents is not None:
        same = (documents[:, index, None] == documents[:, None, :])[:, None]
        mask = same if mask is None else same & (mask if padding is None else mask[:, None, None])
    return {
        "mask": mask,
        "causal": causal,
        "query_positions": query_positions,
        "key_positions": key_positions,
        "query_offset": past,
        "keys": keys,
    }


def keys_before(cache: Cache) -> int | Tensor:
    """Return the number of keys in a cache; a static cache goes on to count in its own tensor."""
    length: int | Tensor = cache.get_seq_length()
    return length.clone() if isinstance(length, Tensor) else length


def part_of_sequence(
    hidden_states: Tensor, context_parallel: ContextParallel, *given: object
) -> dict[str, Any]:
    """Return the result of `masking` for a device's part of a sequence.

    Raises:
        UserError: for anything `given` of masks, positions, a cache or documents.
    """
    if any(each is not None for each in given):
        raise UserError(
            "context_parallel spreads whole sequences over devices, without attention_mask,"
            " position_ids, past_key_values or packed documents"
        )
    length, device = hidden_states.shape[1], hidden_states.device
    return {
        "query_positions": context_parallel.positions(length, device),
        "query_offset": 0,
        "context_parallel": context_parallel,
    }


def mask_of_generation(inputs: Mapping[str, Any], position_ids: Tensor) -> Tensor:
    """Return the mask of a step of `generate`, which drops a mask of ones, or that mask.

    Without a mask, `position_ids` that do not count on by one would begin documents.

    Raises:
        UserError: for positions that are not those of all keys.
    """
    cache = next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)
    past = 0 if cache is None else int(cache.get_seq_length())
    tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    keys = past + tokens.shape[1]
    if position_ids.shape[1] != keys:
        raise UserError(
            f"position_ids {list(position_ids.shape)} must be those of all {keys} cached and new "
            "keys; generate with prefill_chunk_size leaves out the cached ones"
        )
    mask: Tensor | None = inputs.get("attention_mask")
    return position_ids.new_ones(position_ids.shape[0], keys) if mask is None else mask


def positions_of_gaps(attention_mask: Tensor | None, relative: bool) -> Tensor | None:
    """Return the positions of all keys in a step of `generate`, None for a mask without gaps."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    tokens = attention_mask.bool()
    if look(has_gaps(tokens)) is not True:
        return None
    return count_visible(tokens) + (first_visible(tokens) if relative else 0)


def visible_keys(
    attention_mask: Tensor, batch: int, rows: int, keys: int, past: int | Tensor
) -> Tensor:
    """Return the mask as booleans, padded to the length of a static cache."""
    if not isinstance(attention_mask, Tensor):
        name = type(attention_mask).__name__
        raise UserError(f"attention_mask is a {name}; give a tensor [batch, keys]")
    shape = list(attention_mask.shape)
    in_floats = attention_mask.is_floating_point()
    whole = attention_mask.ndim == 4 and not in_floats
    if attention_mask.ndim != 2 and not whole:
        raise UserError(
            f"attention_mask {shape} of {attention_mask.dtype} must be [batch, keys], or boolean "
            "or integer [batch, 1, queries, keys], 1 where a key may be seen; in place of an "
            "additive mask of zeros and -inf give mask == 0"
        )
    # Tokenizers give whole numbers, which an ONNX file takes without a check.
    if in_floats or not (attention_mask.dtype == torch.bool or unchecked()):
        refuse(look(((attention_mask != 0) & (attention_mask != 1)).any()), _VALUES)
    if whole:
        if shape[2] != rows:
            raise UserError(
                f"attention_mask {shape} of four axes must have a row for each of {rows} queries, "
                "as the mask takes the place of causality; give padding as [batch, keys]"
            )
        return attention_mask.bool()
    if shape[0] != batch:
        raise UserError(f"attention_mask {shape} must be [{batch}, keys]")
    covers = not isinstance(past, int) or shape[1] == past + rows or shape[1] == keys
    if isinstance(past, Tensor):
        check_covered(attention_mask, past + rows)
    if shape[1] > keys or not covers:
        full = f", and the static cache holds {keys}" if past + rows > keys else ""
        raise UserError(
            f"attention_mask {shape} must cover {past} cached and {rows} new keys{full}"
        )
    return pad(attention_mask.bool(), (0, keys - shape[1]))


def check_positions(position_ids: Tensor, batch: int, rows: int, past: int | Tensor) -> None:
    """Raise a `UserError` for positions unlike tokens, or tokens and cache, or not whole."""
    shape = list(position_ids.shape)
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise UserError(
            f"position_ids {shape} are {position_ids.dtype}; positions are whole numbers, and the"
            " schemes pi, ntk and yarn interpolate"
        )
    if isinstance(past, int):
        covers = shape[-1] == rows or shape[-1] == past + rows
    else:
        covers = shape[-1] >= rows
    # In compiled code `in` does not find a length of a symbol in a tuple, and `==` does.
    if len(shape) != 2 or not (shape[0] == 1 or shape[0] == batch) or not covers:
        raise UserError(
            f"position_ids {shape} must be [1 or {batch}, {rows}], or with positions of the cached "
            f"keys in front [1 or {batch}, {past + rows}]"
        )


def positions_of_keys(
    tokens: Tensor, position_ids: Tensor | None, rows: int, past: int | Tensor
) -> Tensor:
    """Return the positions of keys, counted over `tokens`; `position_ids` give the last.

    Earlier keys count back from the first given position of a visible token, because callers give
    hidden tokens any position.
    """
    counted = count_visible(tokens)
    if position_ids is None:
        return counted
    given = position_ids.shape[1]
    index = torch.arange(given, device=tokens.device) + (past + rows - given)
    shift = position_ids - counted[:, index]
    shifted = counted + shift.gather(1, first_visible(tokens[:, index].expand_as(shift)))
    return shifted.index_copy(1, index, position_ids.to(shifted.dtype).expand(shifted.shape[0], -1))


def count_visible(tokens: Tensor) -> Tensor:
    """Return the number of visible tokens before each token, from 0."""
    return (tokens.cumsum(-1) - 1).clamp(min=0)


def first_visible(tokens: Tensor) -> Tensor:
    """Return the index of the first visible token of each row, `[B, 1]`.

    Without gaps, a relative scheme takes indices for positions, and a rotation has turned cached
    keys by indices. Positions beside gaps therefore count from the index of the first token.
    """
    return tokens.int().argmax(-1, keepdim=True)


def has_gaps(tokens: Tensor) -> Tensor:
    """Return whether hidden tokens lie between visible tokens of a row, as a tensor."""
    keys = tokens.shape[-1]
    index = torch.arange(keys, device=tokens.device)
    first, last = index.where(tokens, keys).amin(-1), index.where(tokens, -1).amax(-1)
    return (last - first + 1 > tokens.sum(-1)).any()


def moved(positions: Tensor, tokens: Tensor) -> Tensor:
    """Return whether visible tokens are not as far apart as indices, as a tensor."""
    shift = positions - torch.arange(positions.shape[1], device=positions.device)
    least, most = torch.iinfo(shift.dtype).min, torch.iinfo(shift.dtype).max
    first, last = shift.masked_fill(~tokens, most).amin(-1), shift.masked_fill(~tokens, least)
    return (first < last.amax(-1)).any()


def documents_of_positions(key_positions: Tensor, past: int | Tensor) -> Tensor | None:
    """Return the document number of each key, or None if every row is a single document.

    A document begins where positions do not increase by 1. A look at positions makes the host wait
    for a GPU, and cannot be traced. Therefore a traced model always gets the mask of documents.

    Raises:
        UserError: for positions below the number of cached keys, whose document is then unknown.
    """
    begins = key_positions.diff(prepend=key_positions[:, :1] - 1) != 1
    if isinstance(past, Tensor) or past:
        refuse(
            look((key_positions[:, 0] < 0).any() & (past > 0)),
            "position_ids begin below the number of cached keys: give attention_mask [batch, keys],"
            " 1 for visible cached and new keys",
        )
    if is_tracing(begins):
        return begins.cumsum(-1)
    return begins.cumsum(-1) if begins.any() else None


def documents_of_keys(documents: Tensor, keys: int, past: int | Tensor) -> Tensor:
    """Return the numbers of documents, padded to the length of a static cache.

    Raises:
        UserError: for cached keys without document numbers.
    """
    if int(past):
        raise UserError(
            f"seq_idx and cu_seq_lens_q do not cover {int(past)} cached keys: give "
            "attention_mask [batch, keys], 1 for visible cached and new keys"
        )
    return pad(documents, (0, keys - documents.shape[1]), value=-1)


def count_within(documents: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Return the number of earlier tokens in the document, of those that `tokens` shows."""
    index = torch.arange(documents.shape[1], device=documents.device)
    begins = documents.diff(prepend=documents[:, :1] - 1) != 0
    starts = torch.where(begins, index, 0).cummax(-1).values
    if tokens is None:
        return index - starts
    earlier = (tokens.cumsum(-1) - tokens.long()).expand_as(starts)
    return earlier - earlier.gather(-1, starts)
