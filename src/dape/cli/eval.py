"""`dape eval`: what models make of long texts, each by the same measure on the same tokens."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text
from tyro.constructors import PrimitiveConstructorSpec

from dape.cli.arguments import parse
from dape.errors import UserError

if TYPE_CHECKING:
    import torch

    from dape.evaluate.runs import Run

TIMES_TRAINED = 16
IDLE = {  # options that only perplexity heeds, and those about a corpus
    "retrieval": ("protocol", "stride", "documents", "blocks", "bos", "metric"),
    "harness": (
        *("protocol", "stride", "documents", "blocks", "bos", "metric", "split", "data", "seed"),
    ),
}


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


def commas(metavar: str, read: Callable[[str], tuple[Any, ...]]) -> PrimitiveConstructorSpec[Any]:
    """Return how an option is read whose one word holds several values."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


Lengths = Annotated[tuple[int, ...], commas("INT,INT,...", lengths)]
Fractions = Annotated[
    tuple[float, ...], commas("FLOAT,...", lambda text: tuple(map(float, text.split(","))))
]
Names = Annotated[tuple[str, ...], commas("NAME,...", lambda text: tuple(text.split(",")))]


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Does the model tell, at the end of a text, the number that was hidden in it?"""

    tasks: Annotated[Names, tyro.conf.arg(name="retrieval")] = ()
    """instead of perplexity: passkey (in five sentences, over and over), needle (in text of the
    corpus), or passkey,needle"""
    depths: Fractions = (0.0, 0.25, 0.5, 0.75, 1.0)
    """how much of the text comes before the number"""
    trials: int = 10
    """numbers at each length and depth"""

    def __post_init__(self) -> None:
        """Refuse depths outside the text, and no trials."""
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise UserError(f"--depths {','.join(map(str, self.depths))}: each from 0 to 1")
        if self.trials < 1:
            raise UserError(f"--trials {self.trials}: at least 1")


@dataclass(frozen=True, slots=True)
class Harness:
    """Tasks of the Language Model Evaluation Harness, `pip install 'dape[harness]'`."""

    tasks: Annotated[Names, tyro.conf.arg(name="harness")] = ()
    """instead of perplexity: tasks of lm-eval, such as lambada_openai,wikitext; --lengths are the
    most tokens that a request keeps, by default the training length"""
    include_path: Path | None = None
    """folder with tasks of your own (YAML)"""
    limit: int | None = None
    """at most so many documents of a task"""


@dataclass(frozen=True, slots=True)
class Arguments:
    """Measure perplexity over length: the same tokens for every length and model.

    A model is a run folder, or with --data a folder or a hub name of any causal language model of
    transformers. Writes RUN/evaluation/PROTOCOL.json, which `dape plot` draws.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, as `dape train` leaves them; model folders; names on the Hugging Face hub, whose
    results go to runs/NAME"""
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
    bos: bool = False
    """let a model's own token for the beginning of a text take the place of the first of each
    window; Gemma needs it"""
    metric: Literal["perplexity", "bits_per_byte", "loss"] = "perplexity"
    """what the table on the screen shows; the file holds all"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one"""
    batch_tokens: int = 16384
    """tokens in one forward; a window that is longer goes alone"""
    seed: int = 0
    """of the choice of documents, and of hidden numbers"""
    retrieval: Annotated[Retrieval, tyro.conf.arg(name="")] = Retrieval()
    harness: Annotated[Harness, tyro.conf.arg(name="")] = Harness()

    def __post_init__(self) -> None:
        """Refuse counts below one, no runs, and options without a meaning."""
        if not self.runs:
            raise UserError("no run given: dape eval RUN...")
        for name in ("documents", "blocks", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        _refuse_idle(self)


def _refuse_idle(arguments: Arguments) -> None:
    """Raise a `UserError` for an option that the measurement asked for would not heed."""
    retrieval, harness = arguments.retrieval, arguments.harness
    if retrieval.tasks and harness.tasks:
        raise UserError("--retrieval and --harness: one at a time")
    if not retrieval.tasks and retrieval != Retrieval():
        raise UserError("--depths and --trials belong to --retrieval TASKS")
    if not harness.tasks and harness != Harness():
        raise UserError("--include-path and --limit belong to --harness TASKS")
    kind = "retrieval" if retrieval.tasks else "harness" if harness.tasks else "perplexity"
    for field in fields(arguments):
        if field.name in IDLE.get(kind, ()) and getattr(arguments, field.name) != field.default:
            raise UserError(f"--{field.name} has no meaning with --{kind}; leave it out")


def main(argv: list[str]) -> None:
    """Measure the runs one after the other, write their files and print the table."""
    if argv[:1] == ["context"]:
        from dape.cli.eval_context import main as use_of_context

        return use_of_context(argv[1:])
    arguments = parse(Arguments, argv, prog="dape eval")
    from transformers.utils import logging

    from dape.evaluate.runs import open_run

    logging.disable_progress_bar()  # of the loading of weights
    runs = [open_run(folder) for folder in arguments.runs]
    if arguments.retrieval.tasks:
        from dape.cli import eval_retrieval

        eval_retrieval.run(runs, arguments, argv)
    elif arguments.harness.tasks:
        from dape.cli import eval_harness

        eval_harness.run(runs, arguments, argv)
    else:
        from dape.cli import eval_perplexity

        eval_perplexity.run(runs, arguments, argv)


def default_lengths(runs: Sequence["Run"]) -> tuple[int, ...]:
    """Return the shortest training length and its doublings, up to 16 times the longest."""
    known = [trained_at(run) for run in runs]
    return tuple(doubled(min(known), TIMES_TRAINED * max(known)))


def trained_at(run: "Run") -> int:
    """Return the training length of a run; raise `UserError` if its model does not say."""
    if run.train_length is None:
        raise UserError(f"{run.source} does not say at what length it was trained; give --lengths")
    return run.train_length


def progress() -> Progress:
    """Return the bar that is drawn on stderr."""
    return Progress(BarColumn(), Speed(), TimeRemainingColumn(), console=Console(stderr=True))


def announce(console: Console, what: str, length: int, outcome: str) -> None:
    """Print a line on what was just measured, which a screen without a bar shows too."""
    text = f"{what}  length {length:,}  {outcome}"
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
