"""The scores A, the bias B and the logits of queries in the layers of a model, over all keys.

The values come from a forward pass of the model. During the pass, a recording adapter wraps the
adapter of every attention and keeps the rows of the queries. Attention is computed in blocks of
rows, and memory is linear in the length.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dape.errors import UserError
from dape.positions.adapter import Rows, adapted


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A query in a layer, with arrays [heads, keys], in a causal model up to the query's own key.

    Attributes:
        residual: whether the logits are A + B + f(A, B), or A + f(A, B).
        scores: A, scaled and rotated, as the adapter gets A.
        bias: B.
        logits: the input of the softmax.
    """

    layer: int
    residual: bool
    scores: Float[np.ndarray, "heads keys"]
    bias: Float[np.ndarray, "heads keys"]
    logits: Float[np.ndarray, "heads keys"]

    @property
    def shift(self) -> Float[np.ndarray, "heads keys"]:
        """The sum of all terms added to the scores: logits - A, in float64."""
        return self.logits.astype(np.float64) - self.scores

    @property
    def change(self) -> Float[np.ndarray, "heads keys"]:
        """f(A, B): logits - A - B, or logits - A where B is no summand."""
        return self.shift - self.bias if self.residual else self.shift

    @property
    def rounding(self) -> Float[np.ndarray, "heads 1"]:
        """How far a constant line of f may vary, because f is a difference of rounded logits."""
        largest = np.abs(self.scores).max(axis=1) + np.abs(self.bias).max(axis=1)
        return 4 * np.finfo(self.logits.dtype).eps * largest[:, None]

    @property
    def weights(self) -> Float[np.ndarray, "heads keys"]:
        """Return the softmax of the logits."""
        powers = np.exp(self.logits.astype(np.float64) - self.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


class Recorder(nn.Module):
    """A wrapper that returns the logits of an adapter, or A + B, and keeps rows."""

    needs_rows = True

    def __init__(
        self, adapter: nn.Module | None, layer: int, queries: range, keys: int | None = None
    ) -> None:
        super().__init__()
        self.adapter, self.layer, self.queries, self.keys = adapter, layer, queries, keys
        self.residual = bool(getattr(adapter, "residual", True))
        self.rows: list[Row] = []

    def forward(
        self,
        scores: Float[Tensor, "batch heads query key"],
        bias: Float[Tensor, "*#batch heads query key"],
        rows: Rows,
    ) -> Float[Tensor, "batch heads query key"]:
        """Return the logits; keep the rows of the wanted queries in the block."""
        logits = adapted(self.adapter, scores, bias, rows)
        first = int(rows.query_positions.flatten()[0])
        for query in self.queries:
            if first <= query < first + scores.shape[2]:
                keys = query + 1 if self.keys is None else self.keys
                kept = (
                    x.expand_as(scores)[0, :, query - first, :keys].cpu().numpy().copy()
                    for x in (scores, bias, logits)
                )
                self.rows.append(Row(self.layer, self.residual, *kept))
        return logits


def capture(
    model: nn.Module,
    tokens: Int[Tensor, " tokens"],
    layers: Sequence[int] | None = None,
    query: int | None = None,
) -> list[Row]:
    """Return the rows of a query, by default the last, in given layers, by default all.

    `model` is a DAPE model, or a model of transformers with adapters mounted by `dape.retrofit`.

    Raises:
        UserError: for a model without adapters, an unknown layer, or a query outside the tokens.
    """
    query = len(tokens) - 1 if query is None else query
    if not 0 <= query < len(tokens):
        raise UserError(f"query {query} is not one of 0 to {len(tokens) - 1}")
    return [rows[0] for rows in _captured(model, tokens, layers, range(query, query + 1))]


def capture_all(
    model: nn.Module, tokens: Int[Tensor, " tokens"], layers: Sequence[int] | None = None
) -> list[list[Row]]:
    """Return the rows of every query in given layers, by default all; see `capture`."""
    return _captured(model, tokens, layers, range(len(tokens)))


def _captured(
    model: nn.Module,
    tokens: Int[Tensor, " tokens"],
    layers: Sequence[int] | None,
    queries: range,
) -> list[list[Row]]:
    def forward() -> None:
        model(input_ids=tokens[None], use_cache=False, logits_to_keep=1)

    return rows_of(model, forward, queries, layers)


@torch.inference_mode()
def rows_of(
    model: nn.Module,
    forward: Callable[[], object],
    queries: range,
    layers: Sequence[int] | None = None,
    keys: int | None = None,
) -> list[list[Row]]:
    """Return the rows of queries for each layer, for the text that `forward` reads.

    A row ends at its query, or after `keys` keys.

    Raises:
        UserError: for a model without attention of `dape`, or an unknown layer.
    """
    attentions = attending(model)
    chosen = range(len(attentions)) if layers is None else layers
    for layer in chosen:
        if not 0 <= layer < len(attentions):
            raise UserError(f"layer {layer} is not one of 0 to {len(attentions) - 1}")
    with ExitStack() as undo:
        recorders = [_record(undo, attentions[layer], layer, queries, keys) for layer in chosen]
        forward()
    return [recorder.rows for recorder in recorders]


def attending(model: nn.Module) -> list[nn.Module]:
    """Return the modules that call `dape.attention`, in the order of the model.

    Raises:
        UserError: for a model without a call of `dape.attention`.
    """
    from dape.model.blocks import DapeAttention

    found = [
        module
        for module in model.modules()
        if isinstance(module, DapeAttention) or hasattr(module, "attention_backend")
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__} does not call dape.attention, and scores cannot be recorded; "
            "take a model of `dape train` or `dape retrofit`"
        )
    return found


def _record(
    undo: ExitStack, attention: nn.Module, layer: int, queries: range, keys: int | None
) -> Recorder:
    """Put a recorder around the adapter of an attention, until the context ends.

    Meanwhile the backend is `auto`, because fused kernels do not serve a recorder.
    """
    from dape.model.blocks import DapeAttention

    ours = isinstance(attention, DapeAttention)
    chooser, name = (attention.config, "backend") if ours else (attention, "attention_backend")
    for owner, attribute in ((attention, "adapter"), (chooser, name)):
        undo.callback(setattr, owner, attribute, getattr(owner, attribute))
    recorder = Recorder(attention.adapter, layer, queries, keys)  # type: ignore[arg-type]
    attention.adapter = recorder
    setattr(chooser, name, "auto")
    return recorder
