"""Trials of retrieval: a number hidden in a prompt, and the scores of a model at the answer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from dape.evaluate.prompts import Prompt, Prompts
from dape.evaluate.refusal import Refused, explained
from dape.strict import Number

Answer = tuple[Int[np.ndarray, " answer"], Float[np.ndarray, " answer"]]


@dataclass(frozen=True, slots=True)
class Cell:
    """Scores of the trials at a length and a depth.

    The rank of a token of the answer is the number of tokens at least as likely, given the earlier
    tokens of the answer. Rank 1 is the best.

    Attributes:
        length: tokens of the prompt.
        depth: fraction of the text before the number, from 0 to 1.
        exact: fraction of the trials in which greedy decoding gives the whole number.
        accuracy: fraction of the answers' tokens with rank 1.
        rank: mean rank of the answers' tokens.
        log_probability: mean log-probability of the whole number, in nats.
    """

    length: int
    depth: float
    exact: float
    accuracy: float
    rank: float
    log_probability: Number


@dataclass(frozen=True, slots=True)
class Plan:
    """The trials: `trials` numbers per length and depth, drawn by `seed`."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int

    @property
    def tokens(self) -> int:
        """Return the number of input tokens for a model."""
        return sum(self.lengths) * len(self.depths) * self.trials


def retrieve(
    model: Callable[..., Any],
    prompts: Prompts,
    plan: Plan,
    *,
    device: torch.device | str = "cpu",
    batch_tokens: int,
    precision: torch.dtype = torch.float32,
    advance: Callable[[int], object] = lambda tokens: None,
    announce: Callable[[int, str], object] = lambda length, outcome: None,
) -> tuple[list[Cell], dict[int, str]]:
    """Return the cells, and the lengths refused by the model or the prompt, with reasons.

    `model` has the interface of a Hugging Face causal language model. Below float32, `precision` is
    the precision of autocast. `advance` gets the number of tokens of a forward pass, and `announce`
    a length with the outcome.
    """
    cells: list[Cell] = []
    refused: dict[int, str] = {}
    kind = torch.device(device).type
    for length in plan.lengths:
        rows, left = max(1, batch_tokens // length), len(plan.depths) * plan.trials
        try:
            asked = [
                prompts.make(length, depth, trial, plan.seed)
                for depth, trial in product(plan.depths, range(plan.trials))
            ]
            answers: list[Answer] = []
            for first in range(0, len(asked), rows):
                batch = asked[first : first + rows]
                autocast = torch.autocast(kind, precision, precision != torch.float32)
                with explained(length, len(batch)), autocast:
                    answers += score(model, batch, device)
                advance(length * len(batch))
                left -= len(batch)
        except Refused as reason:
            advance(length * left)
            refused[length] = str(reason)
            announce(length, f"refused: {reason}")
            continue
        found = list(_cells(length, plan, answers))
        cells += found
        announce(length, f"exact {np.mean([cell.exact for cell in found]):.0%}")
    return cells, refused


@torch.inference_mode()
def score(
    model: Callable[..., Any], prompts: Sequence[Prompt], device: torch.device | str
) -> list[Answer]:
    """Return rank and log-probability of the tokens of answers, for prompts of equal length.

    Greedy decoding gives an answer if and only if every token of the answer has rank 1 after the
    earlier tokens. Therefore a single forward pass with the answer in place replaces decoding token
    by token.
    """
    tokens = torch.from_numpy(np.stack([prompt.tokens for prompt in prompts])).to(device)
    kept = max(prompt.answer for prompt in prompts)
    output = model(input_ids=tokens[:, :-1], logits_to_keep=kept, use_cache=False)
    logits = output.logits[:, -kept:].float()
    own = logits.gather(-1, tokens[:, -kept:, None])
    ranks = logits.shape[-1] - (logits < own).sum(-1)  # the worst rank for ties and NaN
    log_probabilities = (own - logits.logsumexp(-1, keepdim=True))[..., 0]
    columns = zip(ranks.cpu().numpy(), log_probabilities.cpu().numpy(), prompts, strict=True)
    return [
        (rank[-prompt.answer :], log_probability[-prompt.answer :])
        for rank, log_probability, prompt in columns
    ]


def _cells(length: int, plan: Plan, answers: Sequence[Answer]) -> Iterator[Cell]:
    for place, depth in enumerate(plan.depths):
        trials = answers[place * plan.trials : (place + 1) * plan.trials]
        ranks = np.concatenate([rank for rank, _ in trials])
        yield Cell(
            length=length,
            depth=depth,
            exact=float(np.mean([(rank == 1).all() for rank, _ in trials])),
            accuracy=float((ranks == 1).mean()),
            rank=float(ranks.mean()),
            log_probability=float(np.mean([each.sum(dtype=np.float64) for _, each in trials])),
        )
