"""A, B and f(A, B) of a trained encoder for a placeholder, over all tokens.

A score tells whether a scheme answers, and a map tells by the use of certain tokens. A map is the
mean over examples. A line that follows the place of a key remains in the mean, and a line that
follows the symbol of a key averages out.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from dape.chomsky import cell as cells
from dape.chomsky.benchmark import LONGEST
from dape.chomsky.measure import TEST
from dape.chomsky.task import single
from dape.chomsky.tasks import resolve
from dape.errors import UserError, check_whole
from dape.evaluate.capture import Row, rows_of
from dape.files import read_json, write_json
from dape.positions.rotary import RandomizedRoPE
from dape.provenance import Provenance
from dape.strict import Number, build

FORMAT = 1
DIGITS = 4  # of a number in a map
Lines = list[list[Number]]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer: lines over the keys by head, and numbers as means over the heads.

    `weights` are the weights of the attention. `spread` is the standard deviation of A, B and f
    over the tokens of the input, for an example. `with_scores` and `with_bias` are the correlations
    of f with A and with B over the tokens, and None for a constant line.
    """

    residual: bool
    scores: Lines
    bias: Lines
    change: Lines
    weights: Lines
    spread: dict[str, Number]
    with_scores: float | None
    with_bias: float | None


@dataclass(frozen=True, slots=True)
class Map:
    """A, B and f(A, B) of a model for token `query`; the first `inputs` tokens are the input.

    `length` is the requested number of symbols, and `trained` the longest training input.
    """

    task: str
    scheme: str
    seed: int
    length: int
    trained: int
    examples: int
    inputs: int
    query: int
    layers: list[Layer]
    provenance: Provenance
    format: int = field(default=FORMAT)

    def save(self, file: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(file, asdict(self))


def load(file: Path) -> Map:
    """Read a file of `Map.save`.

    Raises:
        UserError: for a damaged or missing file.
    """
    return read_json(
        file,
        partial(build, Map),
        "make the file again by `dape chomsky map`",
    )


@torch.inference_mode()
def make(
    folder: Path,
    task: str,
    scheme: str,
    seed: int,
    *,
    length: int,
    examples: int,
    provenance: dict[str, Any],
) -> Map:
    """Return the map of the middle placeholder of a trained model of a benchmark's folder.

    Raises:
        UserError: for an untrained model, absent parameters, or random positions.
    """
    check_whole(length=length, examples=examples)
    if length > LONGEST:
        raise UserError(f"--length {length} must be at most {LONGEST}")
    problem = resolve(task)
    encoder = cells.load_model(folder, task, scheme, seed)
    if any(isinstance(module, RandomizedRoPE) for module in encoder.modules()):
        raise UserError(f"--scheme {scheme}: positions are random, take another scheme")
    trained = cells.load(cells.path(folder, task, scheme, seed)).trained
    sample = problem.sample(single(TEST + length, examples), length)
    inputs, out = sample.inputs.shape[1], sample.outputs.shape[1]
    query = inputs + (out - 1) // 2
    found = [
        rows_of(
            encoder, partial(encoder, row[None], out), range(query, query + 1), keys=inputs + out
        )
        for row in sample.inputs
    ]
    layers = [_layer([row for (row,) in rows], inputs) for rows in zip(*found, strict=True)]
    return Map(task, scheme, seed, length, trained, examples, inputs, query, layers, provenance)


def _layer(rows: Sequence[Row], inputs: int) -> Layer:
    """Return the mean of a layer over examples, and the means of the numbers."""
    parts = {
        "scores": np.stack([row.scores for row in rows]).astype(np.float64),
        "bias": np.stack([row.bias for row in rows]).astype(np.float64),
        "change": np.stack([_change(row) for row in rows]),
        "weights": np.stack([row.weights for row in rows]),
    }
    read = {name: part[:, :, :inputs] for name, part in parts.items()}
    return Layer(
        residual=rows[0].residual,
        **{name: _rounded(part.mean(0)) for name, part in parts.items()},
        spread={name: _digits(read[name].std(-1).mean()) for name in ("scores", "bias", "change")},
        with_scores=_correlation(read["change"], read["scores"]),
        with_bias=_correlation(read["change"], read["bias"]),
    )


def _change(row: Row) -> Float[np.ndarray, "heads keys"]:
    """Return f(A, B) of a row; a line that varies by rounding only is constant.

    Without an adapter, f would be the rounding of A + B, and correlate with A and B.
    """
    change, rounding = row.change, row.rounding
    mean = change.mean(axis=1, keepdims=True)
    constant = np.ptp(change, axis=1, keepdims=True) <= rounding
    return np.where(constant, np.where(np.abs(mean) > rounding, mean, 0.0), change)


def _correlation(
    x: Float[np.ndarray, "examples heads keys"], y: Float[np.ndarray, "examples heads keys"]
) -> float | None:
    """Return the mean of Pearson's correlation over examples and heads with variation."""
    x, y = (each - each.mean(-1, keepdims=True) for each in (x, y))
    norms = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    varies = norms > 1e-9
    if not varies.any():
        return None
    return _digits(((x * y).sum(-1)[varies] / norms[varies]).mean())


def _digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _rounded(lines: Float[np.ndarray, "heads keys"]) -> Lines:
    return [[_digits(value) for value in line] for line in lines]
