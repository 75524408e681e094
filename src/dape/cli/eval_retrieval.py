"""`dape eval --retrieval`: a hidden number over depth and length."""

from collections.abc import Sequence
from functools import partial

from dape.cli.eval import Arguments, announce, choose_device, default_lengths, progress
from dape.errors import UserError, unknown
from dape.evaluate.prompts import TASKS, Prompts, needle, passkey
from dape.evaluate.retrieval import Plan, Retrieval, retrieve
from dape.evaluate.runs import Run
from dape.figures.retrieval import table
from dape.provenance import provenance


def run(runs: Sequence[Run], arguments: Arguments, argv: list[str]) -> None:
    """Measure each run on each task, write their files and print the tables."""
    for name in arguments.retrieval.tasks:
        if name not in TASKS:
            raise unknown("--retrieval", name, TASKS)
    found = measure(runs, arguments, argv)
    for name in arguments.retrieval.tasks:
        table([each for each in found if each.task == name]).show()
    folders = " ".join(str(run.folder) for run in runs)
    print(f"draw it: dape plot retrieval {folders} --out retrieval.png")


def measure(runs: Sequence[Run], arguments: Arguments, argv: list[str]) -> list[Retrieval]:
    """Measure the runs, with progress on stderr, and write a file for each task of each run."""
    options, device = arguments.retrieval, choose_device(arguments.device)
    lengths = arguments.lengths or default_lengths(runs)
    plan = Plan(lengths, options.depths, options.trials, arguments.seed)
    origin = provenance(device, ["eval", *argv]) | {"seed": arguments.seed}
    asked = [[prompts(run, name, arguments) for name in options.tasks] for run in runs]
    found = []
    with progress() as bar:
        task = bar.add_task("", total=plan.tokens * len(options.tasks) * len(runs))
        for run, each in zip(runs, asked, strict=True):
            model = run.load(device, max(lengths))
            for name, (made, data) in zip(options.tasks, each, strict=True):
                with run.limits():
                    cells, refused = retrieve(
                        model,
                        made,
                        plan,
                        device=device,
                        batch_tokens=arguments.batch_tokens,
                        advance=partial(bar.advance, task),
                        announce=partial(announce, bar.console, f"{run.folder}  {name}"),
                    )
                found.append(
                    Retrieval(
                        **run.facts(model),
                        task=name,
                        data=data,
                        plan=plan,
                        cells=cells,
                        refused=refused,
                        provenance=origin,
                    )
                )
                found[-1].save()
    return found


def prompts(run: Run, task: str, arguments: Arguments) -> tuple[Prompts, str | None]:
    """Return the prompts of a task for a run, and the checksum of the corpus they take text from.

    Raises `UserError` for a model without a tokenizer, and as `Run.corpus` does.
    """
    if task == "needle":
        corpus = run.corpus(arguments.data)
        return needle(corpus.tokenizer(), corpus, arguments.split), corpus.checksum
    tokenizer = run.tokenizer()
    if tokenizer is None:
        raise UserError(f"{run.source} has no tokenizer.json, in which to write a passkey")
    return passkey(tokenizer), None
