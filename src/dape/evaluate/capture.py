"""The scores A, the bias B and the logits of queries in the layers of a model, over all keys.

They are what the model itself computes in a forward pass: while it runs, an adapter that keeps the
rows of the queries stands around the adapter of each attention. Attention is then computed in
blocks of rows, so that memory is linear in the length.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dape.errors import UserError
from dape.model.modeling import DapeAttention
from dape.positions.adapter import Rows


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One query in one layer; each array is [heads, keys], its own key the last.

    residual: whether the logits are A + B + f(A, B), or A + f(A, B).
    scores: A, as scaled and as rotated as the adapter gets it.
    bias: B.
    logits: the arguments of the softmax.
    """

    layer: int
    residual: bool
    scores: Float[np.ndarray, "heads keys"]
    bias: Float[np.ndarray, "heads keys"]
    logits: Float[np.ndarray, "heads keys"]

    @property
    def shift(self) -> Float[np.ndarray, "heads keys"]:
        """Everything added to the scores: logits - A, in float64."""
        return self.logits.astype(np.float64) - self.scores

    @property
    def change(self) -> Float[np.ndarray, "heads keys"]:
        """f(A, B): logits - A - B, or logits - A where B is no summand."""
        return self.shift - self.bias if self.residual else self.shift

    @property
    def weights(self) -> Float[np.ndarray, "heads keys"]:
        """Return the softmax of the logits."""
        powers = np.exp(self.logits.astype(np.float64) - self.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


class Recorder(nn.Module):
    """An adapter that gives the logits of another, or A + B, and keeps the rows of queries."""

    needs_rows = True

    def __init__(self, adapter: nn.Module | None, layer: int, queries: range) -> None:
        super().__init__()
        self.adapter, self.layer, self.queries = adapter, layer, queries
        self.rows: list[Row] = []

    def forward(
        self,
        scores: Float[Tensor, "batch heads query key"],
        bias: Float[Tensor, "*#batch heads query key"],
        rows: Rows,
    ) -> Float[Tensor, "batch heads query key"]:
        """Return the logits; keep the rows of the queries that the block holds."""
        if self.adapter is None:
            logits = scores + bias
        elif getattr(self.adapter, "needs_rows", False):
            logits = self.adapter(scores, bias, rows)
        else:
            logits = self.adapter(scores, bias)
        first = int(rows.query_positions.flatten()[0])
        residual = bool(getattr(self.adapter, "residual", True))
        for query in self.queries:
            if first <= query < first + scores.shape[2]:
                kept = (
                    x.expand_as(scores)[0, :, query - first, : query + 1].cpu().numpy().copy()
                    for x in (scores, bias, logits)
                )
                self.rows.append(Row(self.layer, residual, *kept))
        return logits


def capture(
    model: nn.Module,
    tokens: Int[Tensor, " tokens"],
    layers: Sequence[int] | None = None,
    query: int | None = None,
) -> list[Row]:
    """Return the rows of a query, by default the last, in the layers asked for, by default all.

    `model` is of this package, or of transformers with adapters mounted by `dape.retrofit`.

    Raises:
        UserError: for any other model, a layer it does not have, or a query that is no token.
    """
    query = len(tokens) - 1 if query is None else query
    if not 0 <= query < len(tokens):
        raise UserError(f"query {query} is not one of 0 to {len(tokens) - 1}")
    return [rows[0] for rows in _captured(model, tokens, layers, range(query, query + 1))]


def capture_all(
    model: nn.Module, tokens: Int[Tensor, " tokens"], layers: Sequence[int] | None = None
) -> list[list[Row]]:
    """Return the rows of every query for each layer asked for, by default all; see `capture`."""
    return _captured(model, tokens, layers, range(len(tokens)))


@torch.inference_mode()
def _captured(
    model: nn.Module,
    tokens: Int[Tensor, " tokens"],
    layers: Sequence[int] | None,
    queries: range,
) -> list[list[Row]]:
    attentions = attending(model)
    chosen = range(len(attentions)) if layers is None else layers
    for layer in chosen:
        if not 0 <= layer < len(attentions):
            raise UserError(f"layer {layer} is not one of 0 to {len(attentions) - 1}")
    with ExitStack() as undo:
        recorders = [_record(undo, attentions[layer], layer, queries) for layer in chosen]
        model(input_ids=tokens[None], use_cache=False, logits_to_keep=1)
    return [recorder.rows for recorder in recorders]


def attending(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that call `dape.attention`, in order.

    Raises:
        UserError: if there are none.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(module, DapeAttention) or hasattr(module, "attention_backend")
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__} does not attend by this package, so that its scores are not "
            "seen; take a model that `dape train` or `dape retrofit` made"
        )
    return found


def _record(undo: ExitStack, attention: nn.Module, layer: int, queries: range) -> Recorder:
    """Put a recorder around the adapter of an attention, until undone.

    The backend becomes `auto` for as long, since fused kernels know no recorder.
    """
    ours = isinstance(attention, DapeAttention)
    chooser, name = (attention.config, "backend") if ours else (attention, "attention_backend")
    for owner, attribute in ((attention, "adapter"), (chooser, name)):
        undo.callback(setattr, owner, attribute, getattr(owner, attribute))
    recorder = Recorder(attention.adapter, layer, queries)  # type: ignore[arg-type]
    attention.adapter = recorder
    setattr(chooser, name, "auto")
    return recorder
