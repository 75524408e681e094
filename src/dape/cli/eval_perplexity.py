"""`dape eval`: perplexity over length of one or more runs, on the same tokens."""

from collections.abc import Sequence
from functools import partial

from dape.cli.eval import Arguments, announce, choose_device, default_lengths, progress
from dape.errors import UserError
from dape.evaluate.compare import compare, group
from dape.evaluate.protocols import protocol
from dape.evaluate.record import Evaluation, evaluation_path
from dape.evaluate.runs import Plan, Run, evaluate, plan
from dape.figures.tables import results, significance
from dape.provenance import provenance


def run(runs: Sequence[Run], arguments: Arguments, argv: list[str]) -> None:
    """Evaluate the runs one after the other, write their files and print the table."""
    show(evaluate_all(runs, plans(runs, arguments), arguments, argv), arguments.metric)


def plans(runs: Sequence[Run], arguments: Arguments) -> list[Plan]:
    """Return what to score for each run; one plan for all that share a corpus.

    Raises `UserError` where perplexities of different corpora or tokenizers would meet, and for a
    model that lacks the token that windows are to begin with.
    """
    if arguments.bos:
        for run in runs:
            run.beginning()
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
            bos=arguments.bos,
        )
        for corpus in {each.checksum: each for each in corpora}.values()
    }
    return [by_corpus[corpus.checksum] for corpus in corpora]


def evaluate_all(
    runs: Sequence[Run], plans: Sequence[Plan], arguments: Arguments, argv: list[str]
) -> list[Evaluation]:
    """Evaluate the runs, with progress on stderr, and write the file of each."""
    device = choose_device(arguments.device)
    origin = provenance(device, ["eval", *argv]) | {"seed": arguments.seed}
    evaluations = []
    with progress() as bar:
        task = bar.add_task("", total=sum(plan.tokens for plan in plans))
        for run, plan in zip(runs, plans, strict=True):
            evaluation = evaluate(
                run,
                plan,
                device=device,
                batch_tokens=arguments.batch_tokens,
                provenance=origin,
                advance=partial(bar.advance, task),
                announce=partial(announce, bar.console, str(run.folder)),
            )
            evaluation.save(
                evaluation_path(run.folder, arguments.protocol, arguments.stride, arguments.split)
            )
            evaluations.append(evaluation)
    return evaluations


def show(evaluations: Sequence[Evaluation], metric: str) -> None:
    """Print the table of results and, for two groups or more, the tests between them."""
    groups = group(evaluations)
    results(groups, metric).show()
    comparisons = compare(groups)
    if comparisons:
        significance(comparisons).show()
