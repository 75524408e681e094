"""What a call of a retrofitted model asks of every attention.

Models of transformers drop some arguments on the way to the attentions. A hook before the forward
of the model, and of its parts that are models, keeps the arguments of the outermost call, and the
mask function hands them to every layer.
"""

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import is_tracing

from dape.errors import UserError
from dape.model.arguments import CACHE_NAMES, packed_documents
from dape.model.conditions import look, refuse
from dape.model.masking import (
    count_within,
    documents_of_keys,
    documents_of_positions,
    keys_before,
    positions_of_keys,
)


class Asked(NamedTuple):
    """What a call asks of every attention.

    `documents` `[B, T]` numbers the documents packed in a row, and is None for a single document.
    `weights` says whether the softmax weights are returned. `positions` `[B, T]` are the given
    `position_ids`. `whose` is the model and the part that is called, by numbers, and None between
    calls. `written` counts the keys in a static cache before the call, and is None for other
    caches.
    """

    documents: Tensor | None = None
    weights: bool = False
    positions: Tensor | None = None
    whose: tuple[int, int] | None = None
    written: int | Tensor | None = None


class _Traced:
    """The value while `torch.compile` traces, which knows no `ContextVar`."""

    asked: Asked = Asked()


_traced = _Traced()  # the compiler of PyTorch 2.11 sets no attribute of a class
_asked: ContextVar[Asked] = ContextVar("asked", default=_traced.asked)


def asked() -> Asked:
    """Return what the present call of the model asks."""
    return _traced.asked if torch.compiler.is_compiling() else _asked.get()


def offset_of(written: int | Tensor | None, rows: int, keys: int) -> int | Tensor:
    """Return the index of the first query among the keys.

    The queries are the last keys, except in a static cache with room behind them.
    """
    if written is None:
        return keys - rows
    return (
        written.clamp(max=keys - rows) if isinstance(written, Tensor) else min(written, keys - rows)
    )


def keep(
    whose: tuple[int, int],
    own_bias: bool,
    joins: tuple[str, int] | None,
    first: int,
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keep what a call asks, before the forward; give a model positions within the documents.

    The model counts positions from `first`. For a model that joins packed documents, `joins` holds
    the reason, and the longest row that keeps documents apart. An `own_bias` of the model, ALiBi,
    does not read `position_ids`. Within a call of a part, a call of another part of the model asks
    nothing. A trainer may call a method of its own in place of the forward; the arguments of the
    method are no tokens.

    Raises:
        UserError: for packed documents, if the model takes no positions or joins them.
    """
    within = asked().whose
    if within is not None and within[0] == whose[0] and within[1] != whose[1]:
        return args, kwargs
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    given = {name: value for name, value in given.items() if value is not None}
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if not isinstance(tokens, Tensor | None):
        return args, kwargs
    weights = model.config.get_text_config().output_attentions
    documents, positions = _documents(tokens, given), given.get("position_ids")
    if documents is not None and not own_bias and "position_ids" not in names:
        raise UserError(
            f"{type(model).__name__} takes no position_ids, and counts positions over all "
            "documents packed in a row: give each document a row of its own"
        )
    if documents is not None and joins is not None and documents.shape[1] > joins[1]:
        refuse(
            look((documents != documents[:, :1]).any()),
            f"{type(model).__name__} {joins[0]}: give each document a row of its own",
        )
    written = _written(given)
    if own_bias or (positions is not None and positions.ndim != 2):
        positions = None
    if positions is not None:
        _check_mask(given.get("attention_mask"), positions, written, documents)
    _set(Asked(documents, bool(given.get("output_attentions", weights)), positions, whose, written))
    if "position_ids" in given or (documents is None and "attention_mask" in given):
        return args, kwargs
    added = _added(tokens, documents, given, first)
    return args, {**kwargs, **{name: added[name] for name in added if name in names[len(args) :]}}


def _added(
    tokens: Tensor | None, documents: Tensor | None, given: Mapping[str, Any], first: int
) -> dict[str, Tensor]:
    """Return positions within documents, or while a model is traced a mask of a single document.

    transformers looks at positions for documents, cannot while traced, and makes a whole mask then.
    """
    if documents is not None:
        mask = given.get("attention_mask")
        shown = None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            shown = mask[:, : documents.shape[1]].bool()
        return {"position_ids": count_within(documents, shown) + first}
    if tokens is None or not is_tracing(tokens) or not set(CACHE_NAMES).isdisjoint(given):
        return {}
    return {"attention_mask": tokens.new_ones(tokens.shape[:2], dtype=torch.long)}


def _written(given: Mapping[str, Any]) -> int | Tensor | None:
    """Return the number of keys written in a static cache, which counts in place, or None."""
    cache = next((given[name] for name in CACHE_NAMES if name in given), None)
    if cache is None or not getattr(cache, "is_compileable", False):
        return None
    return keys_before(cache)


def _check_mask(
    mask: Any, positions: Tensor, written: int | Tensor | None, documents: Tensor | None
) -> None:
    """Refuse a mask of four axes whose visible keys lie otherwise apart than their indices.

    transformers hands such a mask to the attentions without the positions.

    Raises:
        UserError: for such a mask.
    """
    if isinstance(mask, Mapping):  # of each kind of layer
        for each in mask.values():
            _check_mask(each, positions, written, documents)
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.dtype != torch.bool:
        return
    rows, keys = positions.shape[1], mask.shape[3]
    offset = offset_of(written, rows, keys)
    placed = positions_of_keys(positions.new_ones(1, keys), positions, rows, offset)
    index = torch.arange(keys, device=placed.device)
    shift = placed - index
    apart = shift[:, index[:rows] + offset, None] != shift[:, None, :]
    if documents is not None:
        documents = documents_of_keys(documents, keys, offset)
        apart = apart & (documents[:, :rows, None] == documents[:, None, :])
    refuse(
        look((apart & mask[:, 0]).any()),
        "position_ids beside an attention_mask of four axes: adapters see indices, which lie "
        "otherwise apart than the positions; give an attention_mask [batch, keys]",
    )


def forget(whose: tuple[int, int], *_: Any) -> None:
    """Ask nothing, after the forward of the part that was called."""
    if asked().whose == whose:
        _set(Asked())


def _set(value: Asked) -> None:
    if torch.compiler.is_compiling():
        _traced.asked = value
    else:
        _asked.set(value)


def _documents(tokens: Tensor | None, given: Mapping[str, Any]) -> Tensor | None:
    """Return the documents that arguments of a model name, or None.

    As in transformers, `position_ids` tell documents apart without a mask and without a cache.
    """
    if tokens is None:
        return None
    bounds = (given.get(name) for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"))
    found, positions = packed_documents(*tokens.shape[:2], *bounds), given.get("position_ids")
    if found is not None or positions is None or positions.ndim != 2:
        return found
    if not {"attention_mask", *CACHE_NAMES}.isdisjoint(given):
        return None
    return documents_of_positions(positions.expand(tokens.shape[0], -1), 0)
