"""What a trained model adds to its scores: A, B and f(A, B) of one query, over all keys before it.

The rows are those that the model itself computes in a forward pass: while it runs, an adapter that
keeps one row stands around the adapter of each attention. Attention is then computed in blocks of
rows, so that memory is linear in the length. The figure is Figure 1 of Zheng et al., 2024; the
numbers of each head, which name it local or anti-local, are ours.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dape.data.shards import Corpus, Split
from dape.errors import UserError
from dape.evaluate.record import read, write
from dape.evaluate.runs import Run
from dape.model.modeling import DapeAttention
from dape.positions.adapter import Rows

FORMAT = 1
SPANS = 256  # of keys, at most, for which a record keeps the mean of each line
DIGITS = 5  # that a record keeps of such a mean
DENSER = 2.0  # how much denser positive weight is on one side of a head that is named after it


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What one query sees in one layer; each array is [heads, keys], its own key the last.

    residual: whether the logits are A + B + f(A, B), or A + f(A, B).
    scores: A, as scaled and as rotated as the adapter gets it.
    bias: B.
    logits: what the softmax gets.
    """

    layer: int
    residual: bool
    scores: Float[np.ndarray, "heads keys"]
    bias: Float[np.ndarray, "heads keys"]
    logits: Float[np.ndarray, "heads keys"]

    @property
    def shift(self) -> Float[np.ndarray, "heads keys"]:
        """All that position adds to the scores: logits - A, in float64."""
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
    """An adapter that gives the logits of another, or A + B, and keeps the row of one query."""

    needs_rows = True

    def __init__(self, adapter: nn.Module | None, layer: int, query: int) -> None:
        super().__init__()
        self.adapter, self.layer, self.query = adapter, layer, query
        self.row: Row | None = None

    def forward(
        self,
        scores: Float[Tensor, "batch heads query key"],
        bias: Float[Tensor, "*#batch heads query key"],
        rows: Rows,
    ) -> Float[Tensor, "batch heads query key"]:
        """Return the logits; keep the row if the block of queries holds it."""
        if self.adapter is None:
            logits = scores + bias
        elif getattr(self.adapter, "needs_rows", False):
            logits = self.adapter(scores, bias, rows)
        else:
            logits = self.adapter(scores, bias)
        place = self.query - int(rows.query_positions.flatten()[0])
        if 0 <= place < scores.shape[2]:
            kept = (
                x.expand_as(scores)[0, :, place, : self.query + 1].cpu().numpy().copy()
                for x in (scores, bias, logits)
            )
            residual = bool(getattr(self.adapter, "residual", True))
            self.row = Row(self.layer, residual, *kept)
        return logits


@torch.inference_mode()
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
    attentions = attending(model)
    chosen = range(len(attentions)) if layers is None else layers
    query = len(tokens) - 1 if query is None else query
    for name, number, count in (
        *(("layer", layer, len(attentions)) for layer in chosen),
        ("query", query, len(tokens)),
    ):
        if not 0 <= number < count:
            raise UserError(f"{name} {number} is not one of 0 to {count - 1}")
    with ExitStack() as undo:
        recorders = [record(undo, attentions[layer], layer, query) for layer in chosen]
        model(input_ids=tokens[None], use_cache=False, logits_to_keep=1)
    return [recorder.row for recorder in recorders if recorder.row is not None]


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


def record(undo: ExitStack, attention: nn.Module, layer: int, query: int) -> Recorder:
    """Put a recorder around the adapter of an attention, until undone.

    The backend becomes `auto` for as long, since fused kernels know no recorder.
    """
    ours = isinstance(attention, DapeAttention)
    chooser, name = (attention.config, "backend") if ours else (attention, "attention_backend")
    for owner, attribute in ((attention, "adapter"), (chooser, name)):
        undo.callback(setattr, owner, attribute, getattr(owner, attribute))
    recorder = Recorder(attention.adapter, layer, query)  # type: ignore[arg-type]
    attention.adapter = recorder
    setattr(chooser, name, "auto")
    return recorder


@dataclass(frozen=True, slots=True)
class Head:
    """How one head treats near and far keys; a key is far from the distance `Learned.far` on.

    Positive weight is what of a row lies above its mean over the keys, since a softmax does not see
    a constant. None stands where a row is constant.

    head: counted from 0.
    kind: `anti-local` if the positive weight of B + f is `DENSER` times as dense on far keys as on
        near ones, `local` if the reverse holds, otherwise `even`.
    positive_far: share of the positive weight of B + f (of f without residual) on far keys.
    change_far: the same of f alone.
    attention_far: share of the attention on far keys.
    centre: mean distance of the attention, in tokens.
    with_scores, with_bias: correlation of f with A and with B over the keys.
    """

    head: int
    kind: str
    positive_far: float | None
    change_far: float | None
    attention_far: float
    centre: float
    with_scores: float | None
    with_bias: float | None


def describe(row: Row, far: int) -> list[Head]:
    """Return the numbers of each head of a row, where keys at a distance of `far` or more are far.

    Raises:
        UserError: if none, or all, of the keys are far.
    """
    keys = row.scores.shape[1]
    if not 0 < far < keys:
        raise UserError(f"far={far} must be from 1 to {keys - 1}, for {keys} keys to be on sides")
    distance = np.arange(keys)[::-1]
    parts = varying(row)
    shift, change = parts["shift"], parts["change"]
    found = []
    for head, weights in enumerate(row.weights):
        positive = share_far(shift[head], far)
        found.append(
            Head(
                head=head,
                kind=kind_of(positive, 1 - far / keys),
                positive_far=positive,
                change_far=share_far(change[head], far),
                attention_far=float(weights[distance >= far].sum()),
                centre=float(weights @ distance),
                with_scores=correlation(change[head], parts["scores"][head]),
                with_bias=correlation(change[head], parts["bias"][head]),
            )
        )
    return found


def varying(row: Row) -> dict[str, Float[np.ndarray, "heads keys"]]:
    """Return A, B, f and B + f, centred over the keys; zeros where they only vary by rounding."""
    largest = np.abs(row.scores).max(axis=1) + np.abs(row.bias).max(axis=1)
    rounding = 4 * np.finfo(row.logits.dtype).eps * largest[:, None]
    found = {}
    for name in ("scores", "bias", "change", "shift"):
        values = getattr(row, name).astype(np.float64)
        centred = values - values.mean(axis=1, keepdims=True)
        found[name] = np.where(np.ptp(values, axis=1, keepdims=True) > rounding, centred, 0.0)
    return found


def share_far(centred: Float[np.ndarray, " keys"], far: int) -> float | None:
    """Return which share of the positive weight lies `far` or more before the last key."""
    positive = np.maximum(centred, 0)
    return float(positive[:-far].sum() / positive.sum()) if positive.any() else None


def kind_of(share: float | None, keys_far: float) -> str:
    """Return the kind of a head with that share of positive weight on that share of the keys."""
    if share is None:
        return "even"
    far, near = share * (1 - keys_far), (1 - share) * keys_far  # densities, but for a factor
    return "anti-local" if far >= DENSER * near else "local" if near >= DENSER * far else "even"


def correlation(x: Float[np.ndarray, " keys"], y: Float[np.ndarray, " keys"]) -> float | None:
    """Return Pearson's correlation of two centred rows, None if one is constant."""
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else None


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a record: its heads, and A, B and f(A, B) as means over spans of keys."""

    layer: int
    residual: bool
    scores: list[list[float]]
    bias: list[list[float]]
    change: list[list[float]]
    heads: list[Head]


@dataclass(frozen=True, slots=True)
class Learned:
    """What a model learned, as one query of one document shows it.

    `data` is the checksum of the corpus; the query is token `query` of the first `length` tokens of
    document `document`. `spans` holds the first key of each span and the end of the last.
    """

    run: str
    scheme: str
    train_length: int | None
    seed: int | None
    settings: str | None
    parameters: int
    data: str
    split: str
    document: int
    length: int
    query: int
    far: int
    spans: list[int]
    layers: list[Layer]
    provenance: dict[str, Any]
    format: int = field(default=FORMAT)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write(path, self)


def load(path: Path) -> Learned:
    """Read what `Learned.save` wrote.

    Raises:
        UserError: naming the command to run if there is none, or if another version wrote it.
    """
    content = read(path, "record of what was learnt", FORMAT, "run `dape plot learned` on a run")
    content["layers"] = [
        Layer(**{**layer, "heads": [Head(**head) for head in layer["heads"]]})
        for layer in content["layers"]
    ]
    return Learned(**content)


@dataclass(frozen=True, slots=True)
class View:
    """Which query of which text is looked at, and in which layers.

    Raises:
        UserError: for a length without a key before the query.
    """

    layers: tuple[int, ...] = ()
    """layers, counted from 0; by default the first, the middle one and the last"""
    length: int = 2048
    """tokens that the model reads, from the beginning of the document"""
    query: int | None = None
    """token whose row is shown, counted from 0; by default the last"""
    document: int | None = None
    """number of the document in its split; by default the first that is long enough"""
    split: str = "test"
    """part of the corpus: train, validation or test"""

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UserError(f"length {self.length}: at least 2, a query and a key before it")
        if self.query is not None and not 1 <= self.query < self.length:
            raise UserError(f"query {self.query}: from 1 to {self.length - 1}, below the length")

    def find(self, part: Split) -> int:
        """Return the number of the document; raise a `UserError` if none is long enough."""
        lengths = part.document_lengths - 1  # without the end of text
        enough = np.flatnonzero(lengths >= self.length)
        if self.document is None and len(enough):
            return int(enough[0])
        if self.document is None or not 0 <= self.document < len(lengths):
            raise UserError(
                f"document {self.document}: {len(lengths)} documents in the split, numbered from "
                f"0, and the longest has {max(lengths)} tokens; asked for are {self.length}"
            )
        if self.document not in enough:
            raise UserError(
                f"document {self.document} has {lengths[self.document]} tokens, below the length "
                f"{self.length}; leave --document out, or take a shorter length"
            )
        return self.document


def learned(
    run: Run, corpus: Corpus, view: View, *, device: torch.device, provenance: dict[str, Any]
) -> Learned:
    """Return what the model of a run adds to the scores of one query.

    Keys are far from the training length on, or from half of the keys on if there are no more.

    Raises:
        UserError: as `View.find` and `capture` do.
    """
    part = corpus.split(view.split)
    document = view.find(part)
    tokens = torch.from_numpy(part.document(document)[: view.length]).to(device)
    model = run.load(device, view.length)
    last = len(attending(model)) - 1
    rows = capture(model, tokens, view.layers or sorted({0, last // 2, last}), view.query)
    keys = rows[0].scores.shape[1]
    far = run.train_length if run.train_length and run.train_length < keys else keys // 2
    spans = np.linspace(0, keys, min(SPANS, keys) + 1).astype(int)
    return Learned(
        **run.facts(model),
        data=corpus.checksum,
        split=view.split,
        document=document,
        length=view.length,
        query=keys - 1,
        far=far,
        spans=spans.tolist(),
        layers=[
            Layer(
                layer=row.layer,
                residual=row.residual,
                scores=smooth(row.scores, spans),
                bias=smooth(row.bias, spans),
                change=smooth(row.change, spans),
                heads=describe(row, far),
            )
            for row in rows
        ],
        provenance=provenance,
    )


def smooth(
    values: Float[np.ndarray, "heads keys"], spans: Int[np.ndarray, " edges"]
) -> list[list[float]]:
    """Return the mean of each head over each span of keys, rounded."""
    sums = np.add.reduceat(values.astype(np.float64), spans[:-1], axis=1)
    return [[float(f"{x:.{DIGITS}g}") for x in line] for line in sums / np.diff(spans)]
