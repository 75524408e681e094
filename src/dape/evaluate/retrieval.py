"""Whether a model tells at the end of a long text the number that was hidden at a depth of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from dape.evaluate.limits import Refused, told
from dape.evaluate.prompts import Prompt, Prompts
from dape.evaluate.record import read, write

FORMAT = 1
Answer = tuple[Int[np.ndarray, " answer"], Float[np.ndarray, " answer"]]


@dataclass(frozen=True, slots=True)
class Cell:
    """What a model made of the trials at one length and depth.

    A token's rank is the number of tokens that are at least as likely at its place, given the
    answer's tokens before it; 1 is the best.

    exact: fraction of the trials whose whole number greedy decoding gives: all its ranks are 1.
    accuracy: fraction of the answers' tokens with rank 1.
    rank: mean rank of the answers' tokens.
    log_probability: mean over the trials of the log-probability of the whole number, in nats.
    """

    length: int
    depth: float
    exact: float
    accuracy: float
    rank: float
    log_probability: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of a model: so many trials at each of the lengths and depths, by a seed."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int

    @property
    def tokens(self) -> int:
        """Return how many tokens a model is fed."""
        return sum(self.lengths) * len(self.depths) * self.trials


@dataclass(frozen=True, slots=True)
class Retrieval:
    """One model on one task; `data` is the checksum of the corpus around a needle.

    A length that the model or the prompt refused has the reason in `refused` and no cells. The
    other fields are those of `dape.evaluate.record.Evaluation`.
    """

    run: str
    scheme: str
    train_length: int | None
    seed: int | None
    settings: str | None
    parameters: int
    task: str
    data: str | None
    plan: Plan
    cells: list[Cell]
    refused: dict[int, str]
    provenance: dict[str, Any]
    format: int = FORMAT

    def values(self, metric: str) -> Float[np.ndarray, "depths lengths"]:
        """Return a metric, such as `exact`, at every depth and length; NaN if refused."""
        found = {(cell.depth, cell.length): getattr(cell, metric) for cell in self.cells}
        rows = [
            [found.get((depth, length), np.nan) for length in self.plan.lengths]
            for depth in self.plan.depths
        ]
        return np.array(rows, dtype=np.float64)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        write(retrieval_path(Path(self.run), self.task), self)


def load(path: Path) -> Retrieval:
    """Read what `Retrieval.save` wrote; raise `UserError` with the command to run if it cannot."""
    content = read(path, "retrieval", FORMAT, f"run `dape eval --retrieval {path.stem}` on it")
    plan = content["plan"]
    content["plan"] = Plan(
        tuple(plan["lengths"]), tuple(plan["depths"]), plan["trials"], plan["seed"]
    )
    content["cells"] = [Cell(**cell) for cell in content["cells"]]
    content["refused"] = {int(length): why for length, why in content["refused"].items()}
    return Retrieval(**content)


def retrieval_path(run: Path, task: str) -> Path:
    """Return where the retrieval of a run lies: `RUN/retrieval/passkey.json`."""
    return run / "retrieval" / f"{task}.json"


def retrieve(
    model: Callable[..., Any],
    prompts: Prompts,
    plan: Plan,
    *,
    device: torch.device | str = "cpu",
    batch_tokens: int,
    advance: Callable[[int], object] = lambda tokens: None,
    announce: Callable[[int, str], object] = lambda length, outcome: None,
) -> tuple[list[Cell], dict[int, str]]:
    """Return the cells, and the lengths that the model or the prompt refuses, with the reason.

    `model` has the interface of a Hugging Face causal language model. `advance` is told the tokens
    of each forward, `announce` each length and what came of it.
    """
    cells: list[Cell] = []
    refused: dict[int, str] = {}
    for length in plan.lengths:
        rows = max(1, batch_tokens // length)
        try:
            asked = [
                prompts.make(length, depth, trial, plan.seed)
                for depth, trial in product(plan.depths, range(plan.trials))
            ]
            answers: list[Answer] = []
            for first in range(0, len(asked), rows):
                batch = asked[first : first + rows]
                with told(length, len(batch)):
                    answers += score(model, batch, device)
                advance(length * len(batch))
        except Refused as reason:
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
    """Return rank and log-probability of each token of the answers to prompts of one length.

    Greedy decoding gives an answer exactly if each of its tokens has rank 1 after those before it,
    so that one forward with the answer in place tells what decoding token by token would.
    """
    tokens = torch.from_numpy(np.stack([prompt.tokens for prompt in prompts])).to(device)
    kept = max(prompt.answer for prompt in prompts)
    output = model(input_ids=tokens[:, :-1], logits_to_keep=kept, use_cache=False)
    logits = output.logits[:, -kept:].float()
    own = logits.gather(-1, tokens[:, -kept:, None])
    ranks = logits.shape[-1] - (logits < own).sum(-1)  # of ties, and of NaN, the worst
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
