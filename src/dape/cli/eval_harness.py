"""`dape eval --harness`: tasks of lm-eval."""

from collections.abc import Sequence
from importlib.metadata import version

from rich.console import Console

from dape.cli.eval import Arguments, announce, choose_device, trained_at
from dape.errors import UserError
from dape.evaluate.harness import Harnessed, harness, manager
from dape.evaluate.runs import Run
from dape.figures.harness import table
from dape.provenance import provenance


def run(runs: Sequence[Run], arguments: Arguments, argv: list[str]) -> None:
    """Measure each run at each length, write a file for each task, and print the table."""
    options, device = arguments.harness, choose_device(arguments.device)
    known = manager(options.tasks, options.include_path)
    lengths = [arguments.lengths or (trained_at(each),) for each in runs]
    origin = provenance(device, ["eval", *argv])
    origin["versions"]["lm-eval"] = version("lm-eval")
    console, found = Console(stderr=True), []
    for each, own in zip(runs, lengths, strict=True):
        tokenizer, model = each.tokenizer(), each.load(device, max(own))
        if tokenizer is None:
            raise UserError(f"{each.source} has no tokenizer.json, which lm-eval needs")
        for length in own:
            results = harness(
                each,
                model,
                tokenizer,
                options.tasks,
                known,
                max_length=length,
                batch_tokens=arguments.batch_tokens,
                limit=options.limit,
                provenance=origin,
            )
            for result in results:
                result.save()
                announce(console, str(each.folder), length, told(result))
            found += results
    table(found).show()


def told(result: Harnessed) -> str:
    """Return in a few words what came of a task."""
    if result.refused:
        return f"{result.task} refused: {result.refused}"
    return f"{result.task} " + ", ".join(f"{s.metric} {s.value:.4g}" for s in result.scores)
