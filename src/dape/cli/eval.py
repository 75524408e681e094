"""`dape eval`: perplexity over length of models, on the same tokens."""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from dape.cli.arguments import parse
from dape.cli.options import Measuring, at_least_one
from dape.errors import UserError
from dape.ranks import ranks
from dape.strict import default

if TYPE_CHECKING:
    from dape.evaluate.record import Evaluation


@dataclass(frozen=True)
class Arguments(Measuring):
    """Measure perplexity over length: the same tokens for every length and model.

    A model is a run folder, or with --data a folder or a hub name of any causal language model of
    transformers. Writes RUN/evaluation/PROTOCOL.json, for `dape plot`. The same command again
    resumes an interrupted evaluation. `torchrun ... -m dape eval RUN ...` spreads every window over
    several devices.
    """

    protocol: Literal["last", "sliding", "non_overlapping"] = "last"
    """scored tokens of a window: the last 256, the last STRIDE, or all"""
    stride: Annotated[int | None, default("required by sliding", "INT")] = None
    """tokens between windows, for the protocol sliding alone"""
    split: Literal["test", "validation", "train"] = "test"
    """split of the corpus"""
    documents: int = 100
    """largest number of documents, drawn among documents longer than the longest window"""
    blocks: int = 4
    """largest number of scored blocks in a document, evenly spread"""
    data: Annotated[Path | None, default("the corpus of the training", "PATH")] = None
    """prepared corpus"""
    bos: bool = False
    """put the beginning-of-text token in place of a window's first token, as Gemma needs"""
    metric: Literal["perplexity", "bits_per_byte", "loss"] = "perplexity"
    """number in the printed table; the file holds all metrics"""
    seed: int = 0
    """seed of the choice of documents"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """precision of products; auto is bf16 on a GPU for bf16 runs and models beside them"""
    again: bool = False
    """measure finished lengths again, instead of skipping finished lengths"""

    def __post_init__(self) -> None:
        """Refuse counts below 1, and an empty list of models."""
        super().__post_init__()
        at_least_one(self, "documents", "blocks")


def main(argv: list[str]) -> None:
    """Measure the models in turn, and print the table."""
    arguments = parse(Arguments, argv, prog="dape eval")
    from transformers.utils import logging

    from dape.attention.context_parallel import over_all_processes
    from dape.cli.progress import progress
    from dape.device import choose_device
    from dape.evaluate.evaluation import evaluate
    from dape.evaluate.watch import SILENT

    logging.disable_progress_bar()  # progress bars of loading
    check_no_index(arguments.device)
    spread, device = over_all_processes(choose_device(arguments.device))
    speaks = spread is None or spread.rank == 0
    with progress() if speaks else nullcontext(SILENT) as watch:
        evaluations = evaluate(
            arguments.runs,
            arguments.data,
            arguments.lengths,
            arguments.protocol,
            stride=arguments.stride,
            split=arguments.split,
            documents=arguments.documents,
            blocks=arguments.blocks,
            bos=arguments.bos,
            metric=arguments.metric,
            seed=arguments.seed,
            device=str(device),
            precision=arguments.precision,
            batch_tokens=arguments.batch_tokens,
            out=arguments.out,
            again=arguments.again,
            partial_weights=arguments.partial_weights,
            command=shlex.join(["dape", "eval", *argv]),
            watch=watch,
            context_parallel=spread,
        )
    if speaks:
        show(evaluations, arguments.metric)


def check_no_index(device: str) -> None:
    """Refuse a single GPU for several processes; each takes a GPU of its own.

    Raises:
        UserError: naming the GPU.
    """
    kind, _, index = device.partition(":")
    if index and kind == "cuda" and ranks() > 1:
        raise UserError(
            f"--device {device}: {ranks()} processes take a GPU each; take --device cuda, and"
            " choose GPUs by CUDA_VISIBLE_DEVICES"
        )


def show(evaluations: Sequence["Evaluation"], metric: str) -> None:
    """Print the table of results and, for two groups or more, tests between groups."""
    from dape.evaluate.compare import compare, group
    from dape.figures.tables import results, significance

    groups = group(evaluations)
    results(groups, metric).show()
    comparisons = compare(groups)
    if comparisons:
        significance(comparisons).show()
