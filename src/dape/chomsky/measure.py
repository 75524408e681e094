"""The accuracy of trained encoders at every length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dape.chomsky.encoder import Encoder
from dape.chomsky.task import Sample, Strings, Task, generator, single

# Added to a length for the seeds of the examples and of randomised positions, beyond all seeds of
# training.
TEST, DRAWN = 2**33, 2**33 + 2**32


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The examples for the scores, equal for all models of a task."""

    longest: int = 500
    """longest tested input; the score covers the lengths above the training length"""
    samples: int = 128
    """examples per length"""
    batch_tokens: int = 65_536
    """most tokens in a forward pass; a longer sequence goes alone"""


@runtime_checkable
class Models(Protocol):
    """Models of a task that answer equal examples."""

    def answers(
        self, inputs: Strings, out: int, generator: torch.Generator
    ) -> Int[Tensor, "models batch out"]:
        """Return the output symbols of every model; random positions come from the generator."""


@dataclass(frozen=True, slots=True)
class OneByOne:
    """Encoders of a configuration, each in a forward pass of its own."""

    encoders: Sequence[Encoder]

    @torch.no_grad()
    def answers(
        self, inputs: Strings, out: int, generator: torch.Generator
    ) -> Int[Tensor, "models batch out"]:
        """Return the output symbols of every encoder."""
        tokens = inputs.shape[1] + out
        noise = self.encoders[0].noise([generator], len(inputs), tokens).one(0)
        return torch.stack([each(inputs, out, noise).argmax(-1) for each in self.encoders])


def accuracies(
    models: Models, task: Task, evaluation: Evaluation, device: torch.device
) -> list[list[float]]:
    """Return the percentage of right scored symbols at lengths 1, 2, ..., by model.

    Symbols have equal weight. Among inputs of equal length, a long answer therefore counts more
    than a short answer. Dropout is off.
    """
    by_length = []
    for length in range(1, evaluation.longest + 1):
        sample = task.sample(single(TEST + length, evaluation.samples, device), length)
        by_length.append(accuracy(models, sample, length, evaluation.batch_tokens))
    found: list[list[float]] = torch.stack(by_length, 1).tolist()  # the only wait for the device
    return found


def accuracy(
    models: Models, sample: Sample, seed: int, batch_tokens: int
) -> Float[Tensor, " models"]:
    """Return the percentage of right scored symbols of a sample, by model, in float64."""
    positions = generator(DRAWN + seed, sample.inputs.device)
    right: Any = 0
    for part in _parts(sample, batch_tokens):
        answers = models.answers(part.inputs, part.outputs.shape[1], positions)
        right = right + ((answers == part.outputs) & part.scored).sum((1, 2))
    found: Tensor = 100 * right.double() / sample.scored.sum()
    return found


def _parts(sample: Sample, batch_tokens: int) -> Iterator[Sample]:
    """Yield a sample in parts of about `tokens` tokens."""
    rows = max(1, batch_tokens // (sample.inputs.shape[1] + sample.outputs.shape[1]))
    for start in range(0, len(sample.inputs), rows):
        yield Sample(*(each[start : start + rows] for each in sample))
