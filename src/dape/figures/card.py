"""The model card of a run, with training and measurements."""

import json
import math
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from dape.data.shards import Corpus
from dape.errors import UserError, install
from dape.evaluate import record, retrieval
from dape.evaluate.compare import METRICS, group, split
from dape.evaluate.record import Evaluation
from dape.figures.retrieval import table as retrieval_table
from dape.figures.tables import NOTHING, Table, describe_targets, number, refusal
from dape.files import read_text
from dape.positions import scheme
from dape.runs import RunFolder
from dape.text import code, code_block, markdown
from dape.train.estimate import size
from dape.train.restore import Trained

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard


def card(trained: Trained, name: str) -> "ModelCard":
    """Return the card of a model with the name `name`.

    Evaluations in the run folder belong to the finished model, and appear only on the finished
    model's card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = RunFolder(trained.run)
    evaluations = [record.load(file) for file in folder.evaluations() if trained.finished]
    retrievals = [retrieval.load(file) for file in folder.retrievals() if trained.finished]
    measured = [
        *((perplexities(each), each.provenance) for each in evaluations),
        *((retrieval_table([each]), each.provenance) for each in retrievals),
    ]
    recipe, steps = trained.recipe, f"{trained.step:,} of {trained.recipe.training.steps:,} steps"
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["dape", recipe.model.scheme],
            model_name=name,
            eval_results=[result for each in evaluations for result in results(each)] or None,
        ),
        template_str=files("dape.figures").joinpath("card.md.jinja").read_text(encoding="utf-8"),
        name=markdown(name),
        install=install(),
        quoted=json.dumps(name),
        parameters=f"{size(trained.model).parameters:,}",
        length=f"{recipe.training.length:,}",
        scheme=recipe.model.scheme,
        papers=papers(recipe.model.scheme),
        steps="" if trained.finished else steps,
        training=training(trained),
        recipe=code_block(read_text(folder.recipe), "yaml"),
        measured="\n\n".join(f"{table.markdown()} {origin(made)}" for table, made in measured),
    )


def training(trained: Trained) -> dict[str, str]:
    """Return known facts of the training, by name."""
    folder, recipe = RunFolder(trained.run), trained.recipe.training
    made = folder.read_record()
    steps = [each for each in folder.read_metrics() if each["step"] == trained.step]
    last = steps[-1] if steps else {}
    data, numbers = made.get("data", {}), size(trained.model)
    tokens = trained.step * recipe.batch_size * recipe.length
    rows = {
        "data": sources(data),
        "checksum of the data": data.get("checksum"),
        "tokens seen": f"{tokens:,} ({trained.step:,} steps of {recipe.batch_size:,} sequences of "
        f"{recipe.length:,})",
        "parameters": f"{numbers.parameters:,}, with {numbers.positional:,} for positions",
        "precision": recipe.precision,
        "training loss of the last step": _shown(last.get("loss"), "{:.4f} nats a token"),
        "validation loss": _shown(last.get("validation_loss"), "{:.4f} nats a token"),
        "seed": str(trained.recipe.seed),
        "hardware": _shown(made.get("device"), f"{made.get('ranks')} x {{}}"),
        "time": _shown(last.get("seconds"), "{:,.0f} s"),
        "versions": ", ".join(f"{k} {v}" for k, v in made.get("versions", {}).items()),
        "commit": made.get("commit"),
    }
    shown = {name: markdown(value) for name, value in rows.items() if value}
    command = made.get("command")
    return shown | ({"command": code(command).replace("|", r"\|")} if command else {})


def _shown(value: Any, form: str) -> str | None:
    return None if value is None else form.format(value)


def sources(data: Mapping[str, Any]) -> str | None:
    """Return the folder of a corpus and, if the folder still exists, the sources."""
    if not data:
        return None
    try:
        corpus = Corpus(data["path"])
    except UserError:
        return data["path"]
    if corpus.checksum != data["checksum"]:
        return data["path"]
    names = ", ".join(source["name"] for source in corpus.manifest["sources"])
    return f"{data['path']}, from {names}"


def papers(name: str) -> str:
    """Return authors and years of the parts of a scheme."""
    adapter, encoding = split(name)
    adapters = [scheme.ADAPTERS[adapter]] if adapter else []
    parts = [*adapters, scheme.BASES[encoding]]
    return " on ".join(f"{part.name}: {part.paper}, {part.year}" for part in parts)


def perplexities(evaluation: Evaluation) -> Table:
    """Return perplexity and bits per byte by length, with the protocol in the note."""
    found = evaluation.by_length
    rows = [
        [
            title,
            *(
                number(getattr(found[length], metric), metric) if length in found else NOTHING
                for length in evaluation.lengths
            ),
        ]
        for metric, title in METRICS.items()
    ]
    note = describe_targets(group([evaluation]))
    if evaluation.refused:
        note += " " + refusal(evaluation.subject.scheme, evaluation.refused)
    header = ["", *(f"{length:,}" for length in evaluation.lengths)]
    title = f"By length of the window, protocol {evaluation.targets.protocol}"
    return Table(title, header, rows, note)


def origin(provenance: Mapping[str, Any]) -> str:
    """Return a sentence on device, versions and command of a measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    commit = f", commit {provenance['commit']}" if provenance["commit"] else ""
    return (
        f"Measured on {markdown(provenance['device'])} with {versions}{commit}, "
        f"{provenance['time']}: {code(provenance['command'])}."
    )


def results(evaluation: Evaluation) -> "Iterator[EvalResult]":
    """Yield finite perplexities by length, in the format of the hub's metadata."""
    from huggingface_hub import EvalResult

    targets = evaluation.targets
    protocol = f"protocol {targets.protocol}"
    for measured in evaluation.measurements:
        if math.isfinite(measured.perplexity):
            yield EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=f"corpus {targets.data[:12]}",
                dataset_split=targets.split,
                dataset_revision=targets.data,
                metric_type="perplexity",
                metric_name=f"perplexity at {measured.length:,} tokens, {protocol}",
                metric_value=round(measured.perplexity, 4),
            )
