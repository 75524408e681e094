"""The accuracy of a trained encoder at every length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dape.chomsky.encoder import Encoder
from dape.chomsky.task import Sample, Task, single

TEST = 2**33  # added to a length for the seed of the examples, beyond all seeds of training


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The examples for the scores, equal for all models of a task."""

    longest: int = 500
    """longest tested input; the score covers the lengths above the training length"""
    samples: int = 128
    """examples per length"""
    batch_tokens: int = 65_536
    """most tokens in a forward pass; a longer sequence goes alone"""


def accuracies(
    encoders: Sequence[Encoder], task: Task, evaluation: Evaluation, device: torch.device
) -> list[list[float]]:
    """Return the percentage of right scored symbols at lengths 1, 2, ..., by encoder.

    Symbols have equal weight. Among inputs of equal length, a long answer therefore counts more
    than a short answer. Dropout is off.
    """
    found: list[list[float]] = [[] for _ in encoders]
    for length in range(1, evaluation.longest + 1):
        sample = task.sample(single(TEST + length, evaluation.samples, device), length)
        for encoder, own in zip(encoders, found, strict=True):
            own.append(accuracy(encoder, sample, length, evaluation.batch_tokens))
    return found


@torch.no_grad()
def accuracy(encoder: Encoder, sample: Sample, seed: int, batch_tokens: int) -> float:
    """Return the percentage of right scored symbols of a sample."""
    generator = torch.Generator(sample.inputs.device).manual_seed(TEST + seed)
    right = torch.zeros((), dtype=torch.long, device=sample.inputs.device)
    for part in _parts(sample, batch_tokens):
        out = part.outputs.shape[1]
        noise = encoder.noise([generator], len(part.inputs), part.inputs.shape[1] + out)
        answers = encoder(part.inputs, out, noise.one(0)).argmax(-1)
        right += ((answers == part.outputs) & part.scored).sum()
    return 100 * right.item() / int(sample.scored.sum())


def _parts(sample: Sample, batch_tokens: int) -> Iterator[Sample]:
    """Yield a sample in parts of about `tokens` tokens."""
    rows = max(1, batch_tokens // (sample.inputs.shape[1] + sample.outputs.shape[1]))
    for start in range(0, len(sample.inputs), rows):
        yield Sample(*(each[start : start + rows] for each in sample))
