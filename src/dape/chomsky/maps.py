"""A, B and f(A, B) of a trained encoder for one placeholder, over all tokens: to read a table by.

A score says that a scheme answers; a map says by which tokens. It is the mean over examples, so
that a line that is left follows the place of a key, and one that averages out followed its symbol.
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
from dape.chomsky.measure import TEST
from dape.chomsky.task import single
from dape.chomsky.tasks import resolve
from dape.errors import UserError
from dape.evaluate.capture import Row, rows_of
from dape.files import read_json, write_json
from dape.positions.rotary import RandomizedRoPE
from dape.provenance import Provenance
from dape.strict import build

FORMAT = 1
DIGITS = 4  # that a map keeps of a number
Lines = list[list[float]]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: each line a head over the keys, and numbers that are means over the heads.

    weights: of the attention. spread: the standard deviation of A, B and f over the tokens of the
    input, for one example. with_scores, with_bias: the correlation of f with A and with B over
    them; None where one of both does not vary.
    """

    residual: bool
    scores: Lines
    bias: Lines
    change: Lines
    weights: Lines
    spread: dict[str, float]
    with_scores: float | None
    with_bias: float | None


@dataclass(frozen=True, slots=True)
class Map:
    """What one model adds to the scores of token `query`; the first `inputs` tokens are the input.

    length: symbols of the input asked for. trained: the longest input trained on.
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
    """Read what `Map.save` wrote.

    Raises:
        UserError: if it is damaged or not there.
    """
    return read_json(
        file,
        partial(build, Map),
        "make it again by `dape chomsky map`",
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
        UserError: if the model was not trained, its parameters are not there, or its positions are
            random.
    """
    problem = resolve(task)
    encoder = cells.load_model(folder, task, scheme, seed)
    if any(isinstance(module, RandomizedRoPE) for module in encoder.modules()):
        raise UserError(f"--scheme {scheme}: its positions are drawn anew, so it has no one map")
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
    """Return the mean of one layer over examples, and the means of its numbers."""
    parts = {
        "scores": np.stack([row.scores for row in rows]).astype(np.float64),
        "bias": np.stack([row.bias for row in rows]).astype(np.float64),
        "change": np.stack([row.change for row in rows]),
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


def _correlation(
    x: Float[np.ndarray, "examples heads keys"], y: Float[np.ndarray, "examples heads keys"]
) -> float | None:
    """Return the mean of Pearson's correlation over examples and heads where both vary."""
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
