"""A, B and f(A, B) of a trained model for every query and key of a passage of text."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from dape.data.tokenizer import encoder, serialize
from dape.errors import UserError
from dape.evaluate.capture import Row, attending, capture_all
from dape.evaluate.learned import choose_document
from dape.evaluate.subject import Model, Subject
from dape.model.blocks import in_use

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Source:
    """The passage for a model to read.

    length: tokens read, from the beginning of the text.
    document: number in the split; by default the first with `length` tokens.
    text: read instead of a document.
    """

    length: int = 128
    split: str = "test"
    document: int | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer: A, B and f(A, B) as [heads, pairs], with query i and key j at index i(i+1)/2 + j.

    residual: whether the logits are A + B + f(A, B), or A + f(A, B).
    module: the bias of the layer, or None.
    """

    layer: int
    residual: bool
    scores: Float[np.ndarray, "heads pairs"]
    bias: Float[np.ndarray, "heads pairs"]
    change: Float[np.ndarray, "heads pairs"]
    module: nn.Module | None


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """The computation of a model on a passage: tokens as text, and layers."""

    subject: Subject
    origin: str
    tokens: list[str]
    layers: list[Layer]


def passage(
    model: Model,
    source: Source,
    *,
    data: str | Path | None = None,
    layers: Sequence[int] = (),
    device: torch.device,
) -> Passage:
    """Return the computation of a model on a passage.

    Args:
        model: a run, or a folder or hub name of a DAPE model.
        source: the passage.
        data: prepared corpus; by default the training corpus of the run.
        layers: counted from 0; by default all.
        device: where the model runs.

    Raises:
        UserError: for a text of fewer than two tokens, or an unknown layer.
    """
    ids, words, origin = _read(model, source, data)
    with model.loaded(device, len(ids)) as network:
        rows = capture_all(network, torch.from_numpy(ids).to(device), layers or None)
        modules = [getattr(each, "position_bias", None) for each in attending(network)]
        return Passage(
            subject=model.subject(network),
            origin=origin,
            tokens=words,
            layers=[_layer(each, modules[each[0].layer]) for each in rows],
        )


def _read(
    model: Model, source: Source, data: str | Path | None
) -> tuple[Int[np.ndarray, " tokens"], list[str], str]:
    """Return the ids of the tokens, the tokens as text, and their source."""
    if source.text is None:
        corpus = model.corpus(data)
        part = corpus.split(source.split)
        number = choose_document(part, source.length, source.document)
        tokenizer, ids = corpus.tokenizer(), part.document(number)[: source.length]
        origin = f"document {number} of the {source.split} split of {corpus.folder}"
    else:
        tokenizer = model.tokenizer() or model.corpus(data).tokenizer()
        ids, origin = encoder(serialize(tokenizer))(source.text)[: source.length], "text given"
    if len(ids) < 2:
        raise UserError("--text has fewer than 2 tokens; give a key and a query")
    ids = ids.astype(np.int64)
    return ids, _words(tokenizer, ids.tolist()), origin


def _words(tokenizer: "PreTrainedTokenizerFast", ids: list[int]) -> list[str]:
    """Return the text of each token, or the token's name for a part of a character."""
    words, before = [], ""
    for place, number in enumerate(ids, 1):
        after = tokenizer.decode(ids[:place])
        whole = after.startswith(before) and not after.endswith("\ufffd") and after != before
        name = tokenizer.convert_ids_to_tokens(number)
        words.append(after[len(before) :] if whole else str(name))
        before = after
    return words


def _layer(rows: list[Row], module: nn.Module | None) -> Layer:
    scores, bias, change = (
        np.concatenate([getattr(row, name) for row in rows], axis=1).astype(np.float32)
        for name in ("scores", "bias", "change")
    )
    kept = None if module is None else deepcopy(in_use(module)).cpu()
    return Layer(rows[0].layer, rows[0].residual, scores, bias, change, kept)
