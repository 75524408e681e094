"""`dape paper`: plan, run and report the experiments behind the paper's tables and figures."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dape.cli.arguments import parse
from dape.cli.options import Names, Seeds, commas
from dape.errors import UserError, unknown
from dape.strict import default
from dape.text import counted

if TYPE_CHECKING:
    from dape.paper.cells import Cell
    from dape.paper.results import Results


REMEDY = "run the command in a folder of yours"


def folders(text: str) -> tuple[tuple[str, str], ...]:
    """Return the pairs in `arxiv=data/pile-arxiv,books=data/pg19`, else a `ValueError`."""
    pairs = [each.partition("=") for each in text.split(",")]
    if not all(name and folder for name, _, folder in pairs):
        raise ValueError(f"{text!r} is not of the form NAME=FOLDER,...")
    if len({name for name, *_ in pairs}) < len(pairs):
        raise ValueError(f"{text!r} names a corpus twice")
    return tuple((name, folder) for name, _, folder in pairs)


Folders = Annotated[tuple[tuple[str, str], ...], commas("NAME=FOLDER,...", folders)]


@dataclass(frozen=True, slots=True)
class Arguments:
    """Plan experiments, train and measure missing cells, and write the tables.

    Experiments run in the given order, and the longest cells of each first. With --minutes the
    longest cells of all that end in time come first. The same command again resumes after an
    interruption, and skips finished cells.
    """

    names: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="NAME...", help_behavior_hint="(required)"),
    ]
    """names of experiments (`dape paper list`)"""
    plan: bool = False
    """print the plan with the cost, and stop"""
    only: Annotated[Names, default("all")] = ()
    """arms to run, as dape-kerple,kerple"""
    seeds: Annotated[Seeds, default("all")] = ()
    """seeds to run, as 0,1"""
    minutes: Annotated[float | None, default("no limit", "FLOAT")] = None
    """minutes for all cells: a cell that would end later, by the plan, does not start"""
    overlap: bool = False
    """start the next cell half a minute before a training ends; the GPU needs memory for both"""
    scale: Literal["full", "smoke"] = "full"
    """full, or smoke for miniatures on a CPU and the source of Python's library in runs/smoke"""
    data: Annotated[Folders, default("data/NAME")] = ()
    """folders of prepared corpora, as arxiv=FOLDER"""
    retry: bool = False
    """run diverged cells again, and cells that ran out of memory"""
    discard: bool = False
    """delete checkpoints and model of a finished cell, and keep small results"""

    def __post_init__(self) -> None:
        """Refuse an empty list of experiments, and a time that is none."""
        if not self.names:
            raise UserError(
                "name an experiment: dape paper NAME (`dape paper list` lists all names)"
            )
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise UserError(f"--minutes {self.minutes:g}: must be a finite number above 0")


def main(argv: list[str]) -> int | None:
    """Plan, run cells that are due, and show the results so far."""
    arguments = parse(Arguments, argv, prog="dape paper")
    from dape.data.shards import Corpus
    from dape.files import check_writable, locked
    from dape.paper.cells import once
    from dape.paper.experiment import check_data, smoke
    from dape.paper.experiments import find
    from dape.paper.results import TABLE, results

    experiments = [find(name) for name in arguments.names]
    if arguments.scale == "smoke":
        experiments = [smoke(each) for each in experiments]
    data = dict(arguments.data)
    check_data(experiments, data)
    if not arguments.plan:
        for folder in data.values():
            Corpus(folder)  # or an error that names the folder
        check_writable(*(each.folder / TABLE for each in experiments), remedy=REMEDY)
    groups = [each.cells(data) for each in experiments]
    turns: dict[str, int] = {}
    for turn, group in enumerate(groups):
        for cell in group:
            turns.setdefault(cell.name, turn)
    status = run(once(cell for group in groups for cell in group), turns, arguments)
    if not arguments.plan:
        for each in experiments:
            with locked(each.folder, busy=None):  # the last of several processes writes all cells
                show(results(each, data))
    return status


def run(cells: list["Cell"], turns: dict[str, int], arguments: Arguments) -> int:
    """Print the plan, and run cells that are due, by their turns, unless `--plan` is set."""
    from dape.evaluate.significance import FEWEST_DOCUMENTS
    from dape.paper import plan, record, spread

    arms = {cell.arm for cell in cells}
    for arm in arguments.only:
        if arm not in arms:
            raise unknown("arm", arm, arms)
    check_seeds(cells, arguments.seeds)
    devices = spread.devices()
    before = record.ends(cells)  # a cell that another process ends after the plan does not start
    planned = plan.plan(cells)
    due = plan.choose(planned, arguments.only, arguments.retry, arguments.seeds, turns)
    asked = plan.asked(planned, arguments.only, arguments.seeds)
    named = {cell.name for cell in (*due, *(each.cell for each in asked))}
    shown = [each for each in planned if each.cell.name in named]
    plan.table(shown, len(devices), due).show()
    for folder, waiting in plan.without_corpus(due).items():
        remedy = "prepare the corpus (docs/paper.md), or give --data"
        due = without(waiting, due, f"no corpus in {folder}", remedy)
    for folder, waiting in plan.without_model(due).items():
        due = without(waiting, due, f"no model in {folder}", "make the model (docs/paper.md)")
    if (timed := [cell for cell in due if cell.gpu]) and devices == ["cpu"]:
        due = without(timed, due, "no GPU on this machine", "run the command on one with a GPU")
    for (folder, longest), (number, waiting) in plan.long_documents(due).items():
        few = (
            f"{counted(number, 'document')} of the test split in {folder}"
            f" {'exceeds' if number == 1 else 'exceed'} {longest:,} tokens"
        )
        if number == 0:
            due = without(waiting, due, few, "add longer texts (docs/paper.md)")
        elif number < FEWEST_DOCUMENTS:
            print(f"{few}; p-values over documents need {FEWEST_DOCUMENTS} (docs/paper.md)")
    if arguments.plan or not due:
        return 0
    prices = {each.cell.name: each.minutes for each in planned if each.minutes is not None}
    if arguments.minutes is not None:
        overlap = spread.START / 60 if arguments.overlap else 0.0
        due = plan.pack(due, prices, len(devices), arguments.minutes, overlap)
    ends = spread.spread(
        due,
        devices,
        spread.Workers(),
        lambda line: print(line, flush=True),
        arguments.minutes,
        weights=not arguments.discard,
        overlap=arguments.overlap,
        prices=prices,
        before=before,
    )
    left = len(due) - len(ends)
    failed = [end for end in ends if end.error]
    done = len(ends) - len(failed)
    print(
        f"{counted(done, 'cell')} finished, {len(failed)} failed, {left} left (in another process,"
        " or for lack of time)"
    )
    return 1 if failed else 0


def without(waiting: list["Cell"], due: list["Cell"], reason: str, remedy: str) -> list["Cell"]:
    """Return the cells that are due without those that wait, and print why these wait."""
    wait = "waits" if len(waiting) == 1 else "wait"
    print(f"{reason}: {counted(len(waiting), 'cell')} {wait}; {remedy}")
    return [cell for cell in due if cell not in waiting]


def check_seeds(cells: list["Cell"], seeds: tuple[int, ...]) -> None:
    """Refuse seeds that no cell has; a cell of encoders trains all its seeds side by side.

    Raises:
        UserError: naming the seed and the seeds of the cells.
    """
    known = sorted({cell.training.seed for cell in cells if cell.training})
    for seed in seeds:
        if seed not in known:
            have = f"the seeds of the cells are {', '.join(map(str, known))}"
            raise UserError(
                f"--seeds {seed}: {have if known else 'no cell is of a single seed'}; leave --seeds"
                " out, or name seeds of the cells"
            )


def show(found: "Results") -> None:
    """Write the results so far of an experiment, and print the tables."""
    from dape.paper.results import verdicts_table

    if not found.cells:
        print(f"{found.experiment.name}: nothing is finished yet")
        return
    found.write()
    for section in found.sections:
        for table in section.tables:
            table.show()
    if found.verdicts:
        verdicts_table(found.verdicts).show()
    print(f"wrote {found.experiment.folder}")
