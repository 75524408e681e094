"""Where the queries and keys of a forward pass stand: mask, positions and offset."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from dape.errors import UserError


def whereabouts(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    relative: bool,
) -> dict[str, Any]:
    """Return mask, positions and offset of the queries, as `dape.attention` takes them.

    Positions stay None, meaning slots, where padding cannot move them: a scheme that is `relative`
    throughout keeps its biases unbatched. Given `position_ids` hold for queries and their keys;
    cached keys, whose positions nobody gives, count back from the first query.

    Raises:
        UserError: for an `attention_mask` that does not fit.
    """
    rows = keys = hidden_states.shape[1]
    past: int | Tensor = 0
    if past_key_values is not None:
        past = past_key_values.get_seq_length()
        past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts on
        keys = past_key_values.get_mask_sizes(rows, 0)[0]
    mask = None if attention_mask is None else visible_keys(attention_mask, rows, keys, past)
    padding = mask if mask is not None and mask.ndim == 2 else None
    query_positions = key_positions = None
    if position_ids is not None or not (relative or padding is None):
        tokens = hidden_states.new_ones(1, keys, dtype=torch.bool) if padding is None else padding
        slots = torch.arange(rows, device=hidden_states.device) + past
        key_positions = (tokens.cumsum(-1) - 1).clamp(min=0)
        query_positions = key_positions[:, slots]
        if position_ids is not None:
            key_positions = key_positions + (position_ids - query_positions)[:, :1]
            query_positions = position_ids.expand(len(key_positions), -1).to(key_positions.dtype)
            key_positions = key_positions.index_copy(1, slots, query_positions)
    return {
        "mask": mask,
        "query_positions": query_positions,
        "key_positions": key_positions,
        "query_offset": past,
    }


def visible_keys(attention_mask: Tensor, rows: int, keys: int, past: int | Tensor) -> Tensor:
    """Return the mask as booleans, padded to the slots of a static cache."""
    shape = list(attention_mask.shape)
    if attention_mask.ndim == 4 and not attention_mask.is_floating_point():
        return attention_mask.bool()
    if attention_mask.ndim != 2:
        raise UserError(
            f"attention_mask {shape} of {attention_mask.dtype} must be [batch, keys], or boolean "
            "or integer [batch, 1, queries, keys], 1 where a key may be seen; never additive"
        )
    if shape[1] > keys or (isinstance(past, int) and shape[1] not in (past + rows, keys)):
        raise UserError(f"attention_mask {shape} must cover {past} cached and {rows} new keys")
    return pad(attention_mask.bool(), (0, keys - shape[1]))
