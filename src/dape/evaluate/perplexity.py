"""The loss of a causal language model on chosen tokens, and statistics of the loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from dape.attention.context_parallel import ContextParallel
from dape.evaluate.protocols import Windows
from dape.evaluate.refusal import explained
from dape.strict import Number

BINS_PER_OCTAVE = 2
Document = Callable[[int], Int[np.ndarray, " tokens"]]


@dataclass(frozen=True, slots=True)
class Measurement:
    """A model at a window length; losses are in nats a token.

    loss: mean over all scored tokens; `loss_error` is the standard error with documents as
        clusters, `sqrt(D / (D - 1) * sum_d (S_d - loss * n_d)^2) / sum_d n_d`, where document d has
        n_d scored tokens with the total loss S_d. None for a single document.
    perplexity: exp(loss).
    bits_per_byte: sum of the losses / ln 2 / UTF-8 bytes of the scored tokens; None if the bytes
        cannot be counted.
    document_losses: mean loss of each document, in the order of the evaluation's documents.
    contexts: the first and last number of earlier tokens, and the mean loss, for each bin of half
        an octave of the number of earlier tokens.
    """

    length: int
    windows: int
    loss: Number
    loss_error: float | None
    perplexity: Number
    bits_per_byte: float | None
    document_losses: list[Number]
    contexts: list[tuple[int, int, Number]]

    def __post_init__(self) -> None:
        """Take a perplexity beyond all numbers, which a file lacks, from the loss."""
        if math.isnan(self.perplexity):
            object.__setattr__(self, "perplexity", _exp(self.loss))


@torch.inference_mode()
def token_losses(
    model: Callable[..., Any],
    document: Document,
    windows: Windows,
    *,
    batch_tokens: int,
    begin: int | None = None,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    advance: Callable[[int], object] = lambda tokens: None,
    context_parallel: ContextParallel | None = None,
) -> Float[np.ndarray, "windows scored"]:
    """Return the cross-entropy in nats of the scored tokens, a row per window.

    `model` has the interface of a Hugging Face causal language model, and computes logits of scored
    positions only. A forward pass holds as many windows as fit into `batch_tokens` tokens, and at
    least a single window. `advance` gets the number of tokens. The token `begin`, if any, replaces
    the first token of a window. Below float32, `precision` is the precision of autocast. With
    `context_parallel` the devices share every window, and all devices return all losses.

    Raises:
        Refused: if the model raises a `UserError`.
        UserError: if memory runs out.
    """
    rows = max(1, batch_tokens // windows.length)
    losses = np.empty((len(windows.ends), windows.scored), dtype=np.float32)
    for first in range(0, len(losses), rows):
        batch = slice(first, first + rows)
        tokens = torch.from_numpy(window_tokens(document, windows, batch)).to(device)
        if begin is not None:
            tokens[:, 0] = begin
        autocast = torch.autocast(tokens.device.type, precision, precision != torch.float32)
        with explained(windows.length, len(tokens)), autocast:
            if context_parallel is None:
                losses[batch] = _forward(model, tokens, windows.scored)
            else:
                losses[batch] = _spread_forward(model, tokens, windows.scored, context_parallel)
        advance(tokens[:, 1:].numel())
    return losses


def window_tokens(
    document: Document, windows: Windows, batch: slice
) -> Int[np.ndarray, "batch window"]:
    """Return the input tokens of the windows of a batch, with the next token at the end."""
    places = zip(windows.documents[batch], windows.ends[batch], strict=True)
    rows = [document(int(index))[end - windows.length - 1 : end] for index, end in places]
    return np.stack(rows).astype(np.int64)


def _forward(
    model: Callable[..., Any], tokens: Int[torch.Tensor, "batch window"], scored: int
) -> Float[np.ndarray, "batch scored"]:
    output = model(input_ids=tokens[:, :-1], logits_to_keep=scored, use_cache=False)
    targets = tokens[:, -scored:]
    logits = output.logits[:, -scored:].float().flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return losses.view_as(targets).cpu().numpy()


def _spread_forward(
    model: Callable[..., Any],
    tokens: Int[torch.Tensor, "batch window"],
    scored: int,
    spread: ContextParallel,
) -> Float[np.ndarray, "batch scored"]:
    """Return the losses from all devices of a window, with a chunk scored on each device.

    A window is padded at the end to chunks of equal size; earlier tokens cannot see the padding.
    """
    inputs, targets = tokens[:, :-1], tokens[:, -scored:]
    length = inputs.shape[1]
    filled = F.pad(inputs, (0, -length % (2 * spread.ranks)))
    positions = spread.part(torch.arange(filled.shape[1], device=tokens.device), dim=0)
    kept = ((positions >= length - scored) & (positions < length)).nonzero()[:, 0]
    padded = spread._replace(end=length)
    output = model(
        input_ids=spread.part(filled), logits_to_keep=kept, use_cache=False, context_parallel=padded
    )
    columns = positions[kept] - (length - scored)
    logits, labels = output.logits.float().flatten(0, 1), targets[:, columns]
    losses = torch.zeros(targets.shape, device=tokens.device)
    losses[:, columns] = F.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels)
    return spread.sum(losses).cpu().numpy()


def measure(
    losses: Float[np.ndarray, "windows scored"],
    windows: Windows,
    document_bytes: Int[np.ndarray, " documents"] | None,
) -> Measurement:
    """Return the statistics of the token losses; sums are taken in float64.

    `document_bytes` counts the UTF-8 bytes of the scored tokens by document, in ascending order,
    and is needed for bits per byte.
    """
    _, owner = np.unique(windows.documents, return_inverse=True)
    tokens = np.bincount(owner) * windows.scored
    sums = np.bincount(owner, weights=losses.sum(axis=1, dtype=np.float64))
    loss = float(sums.sum() / tokens.sum())
    bits = None if document_bytes is None else sums.sum() / math.log(2) / document_bytes.sum()
    return Measurement(
        length=windows.length,
        windows=len(losses),
        loss=loss,
        loss_error=_clustered_error(sums - loss * tokens, int(tokens.sum())),
        perplexity=_exp(loss),
        bits_per_byte=None if bits is None else float(bits),
        document_losses=(sums / tokens).tolist(),
        contexts=_by_context(losses, windows),
    )


def _exp(loss: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


def _clustered_error(residuals: Float[np.ndarray, " documents"], tokens: int) -> float | None:
    count = len(residuals)
    if count < 2:
        return None
    return float(np.sqrt(count / (count - 1) * np.square(residuals).sum()) / tokens)


def _by_context(
    losses: Float[np.ndarray, "windows scored"], windows: Windows
) -> list[tuple[int, int, float]]:
    context = np.arange(windows.length - windows.scored, windows.length) + 1
    bins = np.ceil(BINS_PER_OCTAVE * np.log2(context))
    _, starts = np.unique(bins, return_index=True)
    columns = losses.mean(axis=0, dtype=np.float64)
    return [
        (int(group[0]), int(group[-1]), float(mean.mean()))
        for group, mean in zip(
            np.split(context, starts[1:]), np.split(columns, starts[1:]), strict=True
        )
    ]
