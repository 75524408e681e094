"""`dape eval`: perplexity over length of one or more runs, on the same tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text
from tyro.constructors import PrimitiveConstructorSpec

from dape.cli.arguments import parse
from dape.errors import UserError

if TYPE_CHECKING:
    import torch

    from dape.evaluate.record import Evaluation
    from dape.evaluate.runs import Plan, Run

TIMES_TRAINED = 16


def lengths(text: str) -> tuple[int, ...]:
    """Return the ascending lengths in `128,256,1024` or `128,...,1024`, where `...` doubles.

    Raises `ValueError` for anything else.
    """
    if not re.fullmatch(r"[1-9]\d*(,(\.\.\.,)?[1-9]\d*)*", text):
        raise ValueError(f"{text!r} is no list of lengths")
    found: list[int] = []
    for dots, digits in re.findall(r"(\.\.\.,)?(\d+)", text):
        found += [*(doubled(found[-1], int(digits)) if dots else ()), int(digits)]
    return tuple(sorted(set(found)))


def doubled(first: int, last: int) -> list[int]:
    """Return `first` and its doublings up to `last`."""
    return [first << times for times in range(max(0, last // first).bit_length())]


Lengths = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT,...",
        instance_from_str=lambda words: lengths(words[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    ),
]


@dataclass(frozen=True, slots=True)
class Arguments:
    """Measure perplexity over length: the same tokens for every length and model.

    A model of a run folder, or a Hugging Face model folder with --data. Writes
    RUN/evaluation/PROTOCOL.json; `dape plot` draws it.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, as `dape train` leaves them"""
    lengths: Lengths = ()
    """tokens in a window, as 128,256,512 or 128,...,16384; if not given, the training length
    and its doublings up to 16 times"""
    protocol: Literal["last", "sliding", "non_overlapping"] = "last"
    """which tokens of a window count: the last 256, the last STRIDE, or all"""
    stride: int | None = None
    """tokens that windows of the sliding protocol move by"""
    split: Literal["test", "validation", "train"] = "test"
    """part of the corpus"""
    documents: int = 100
    """at most so many documents, drawn among those that hold the longest window"""
    blocks: int = 4
    """at most so many blocks of scored tokens a document, evenly spread over it"""
    data: Path | None = None
    """prepared corpus; if not given, the one that the run was trained on"""
    metric: Literal["perplexity", "bits_per_byte", "loss"] = "perplexity"
    """what the table on the screen shows; the file holds all"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one"""
    batch_tokens: int = 16384
    """tokens in one forward; a window that is longer goes alone"""
    seed: int = 0
    """of the choice of documents"""

    def __post_init__(self) -> None:
        """Refuse counts below one, and no runs."""
        if not self.runs:
            raise UserError("no run given: dape eval RUN...")
        for name in ("documents", "blocks", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")


def main(argv: list[str]) -> None:
    """Evaluate the runs one after the other, write their files and print the table."""
    arguments = parse(Arguments, argv, prog="dape eval")
    from dape.evaluate.runs import open_run

    runs = [open_run(folder) for folder in arguments.runs]
    show(evaluate_all(runs, plans(runs, arguments), arguments, argv), arguments.metric)


def plans(runs: Sequence["Run"], arguments: Arguments) -> list["Plan"]:
    """Return what to score for each run; one plan for all that share a corpus.

    Raises `UserError` where perplexities of different corpora or tokenizers would meet.
    """
    from dape.evaluate.protocols import protocol
    from dape.evaluate.runs import plan

    asked = list(arguments.lengths or default_lengths(runs))
    rule = protocol(arguments.protocol, asked, arguments.stride)
    corpora = [run.corpus(arguments.data) for run in runs]
    if arguments.metric != "bits_per_byte" and len({each.checksum for each in corpora}) > 1:
        raise UserError(
            f"{arguments.metric} cannot be compared over different corpora or tokenizers "
            f"({', '.join(sorted({str(each.folder) for each in corpora}))}); give one --data, "
            "--metric bits_per_byte, or evaluate the runs one by one"
        )
    by_corpus = {
        corpus.checksum: plan(
            corpus,
            arguments.split,
            rule,
            asked,
            documents=arguments.documents,
            blocks=arguments.blocks,
            seed=arguments.seed,
        )
        for corpus in {each.checksum: each for each in corpora}.values()
    }
    return [by_corpus[corpus.checksum] for corpus in corpora]


def default_lengths(runs: Sequence["Run"]) -> tuple[int, ...]:
    """Return the shortest training length and its doublings, up to 16 times the longest."""
    trained = [run.train_length for run in runs]
    known = [length for length in trained if length]
    if len(known) < len(runs):
        raise UserError("a model does not say at what length it was trained; give --lengths")
    return tuple(doubled(min(known), TIMES_TRAINED * max(known)))


def evaluate_all(
    runs: Sequence["Run"], plans: Sequence["Plan"], arguments: Arguments, argv: list[str]
) -> list["Evaluation"]:
    """Evaluate the runs, with progress on stderr, and write the file of each."""
    from transformers.utils import logging

    from dape.evaluate.record import evaluation_path
    from dape.evaluate.runs import evaluate
    from dape.provenance import provenance

    logging.disable_progress_bar()
    device = choose_device(arguments.device)
    origin = provenance(device, ["eval", *argv]) | {"seed": arguments.seed}
    bar = Progress(BarColumn(), Speed(), TimeRemainingColumn(), console=Console(stderr=True))
    evaluations = []
    with bar:
        task = bar.add_task("", total=sum(plan.tokens for plan in plans))
        for run, plan in zip(runs, plans, strict=True):
            evaluation = evaluate(
                run,
                plan,
                device=device,
                batch_tokens=arguments.batch_tokens,
                provenance=origin,
                advance=partial(bar.advance, task),
                announce=partial(announce, bar.console, run),
            )
            evaluation.save(
                evaluation_path(run.folder, arguments.protocol, arguments.stride, arguments.split)
            )
            evaluations.append(evaluation)
    return evaluations


def announce(console: Console, run: "Run", length: int, outcome: str) -> None:
    """Print a line on what was just measured, which a screen without a bar shows too."""
    text = f"{run.folder}  length {length:,}  {outcome}"
    console.print(text, highlight=False, soft_wrap=True, markup=False)


class Speed(ProgressColumn):
    """Tokens a second."""

    def render(self, task: Task) -> Text:
        """Return the speed of late."""
        return Text(f"{task.speed or 0:,.0f} tokens/s")


def choose_device(name: str) -> "torch.device":
    """Return the device called `name`; raise `UserError` for one that is not here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason}; use cpu, or see `dape info`") from None


def show(evaluations: Sequence["Evaluation"], metric: str) -> None:
    """Print the table of results and, for two groups or more, the tests between them."""
    from dape.evaluate.compare import compare, group
    from dape.figures.tables import results, significance

    groups = group(evaluations)
    results(groups, metric).show()
    comparisons = compare(groups)
    if comparisons:
        significance(comparisons).show()
