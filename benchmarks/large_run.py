"""A recipe on several GPUs from the first step to a table, with a `kill -9` in the middle.

    python benchmarks/large_run.py recipes/2.7b.yaml --data data/books
        --out results/scaling/run-2.7b.json [--gpus 4] [--minutes 25] [--folder runs/large]
        [--lengths 512,1024,2048] [--training.batch_size 128 ...]

Options with a dot are changes of the recipe, after those of `CHANGES`. The file `--out` receives
each phase at its end:

- train: `torchrun -m dape train`. A few steps after the first checkpoint all processes are killed.
- resume: the same command, to the last step. Steps done twice must have equal losses, bit for bit.
- export: `dape export` writes a folder in the format of Hugging Face.
- evaluate: `dape eval` measures the folder on the test split.
- load: transformers loads the folder in bfloat16 and goes on with a sentence.

`--folder` holds checkpoints, models and logs, and is removed at the end. The folder needs 24 bytes
a parameter. `python benchmarks/large_run_report.py` makes the table and the figure of all records.
"""

import argparse
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launch
import torch

from dape.errors import UserError
from dape.files import check_writable, is_free, remove, write_json
from dape.runs import RunFolder
from dape.train.recipe import Recipe

Record = dict[str, Any]
CHANGES: dict[str, Any] = {
    "training.steps": 200,
    "optimizer.warmup": 0.1,
    "tracking.log_every": 1,
    "tracking.validate_every": 50,
    "tracking.validation_batches": 2,
    "tracking.checkpoint_every": 100,
    "tracking.keep_checkpoints": 1,
}
AFTER = 5  # steps done twice, at least
BYTES = 24  # a parameter: two checkpoints; later a checkpoint, the model and the exported folder
PRECISIONS = {"bf16-mixed": "bf16", "fp32": "fp32"}
SENTENCE = "It was a bright morning, and the old man"
SAME = ("loss", "grad_norm")


@dataclass(frozen=True)
class Work:
    """The recipe, the commands and the folder of a run, and the time at which all must be done."""

    recipe: Recipe
    training: list[str]
    folder: Path
    lengths: str
    end: float

    @property
    def run(self) -> RunFolder:
        return self.recipe.run

    @property
    def exported(self) -> Path:
        return self.folder / "exported"

    def log(self, phase: str) -> Path:
        return self.folder / f"{phase}.log"

    def command(self, phase: str, *words: Any) -> str:
        """Run a command in the time that is left, and return its output."""
        return launch.run([*map(str, words)], self.log(phase), self.end - time.time())


def train(work: Work, record: Record) -> Record:
    """Train to a few steps after the first checkpoint, and kill all processes."""
    every = work.recipe.tracking.checkpoint_every
    with launch.started(work.training, work.log("train")) as process:
        while _last_step(work.run) < every + AFTER:
            if process.poll() is not None:
                fault = launch.fault(work.log("train").read_text(), process.returncode)
                raise UserError(f"ended before step {every + AFTER}: {fault}")
            if time.time() > work.end:
                raise UserError(f"in time only {_last_step(work.run)} steps")
            time.sleep(0.05)
        processes = len(launch.family(process.pid))
        launch.kill(process)
    metrics = work.run.read_metrics()
    saved = [
        step for step in range(every, len(metrics) + 1, every) if work.run.checkpoint(step).exists()
    ]
    return {
        "processes": processes,
        "checkpoint": saved[-1],
        "checkpoint_bytes": _bytes(work.run.checkpoint(saved[-1])),
        "metrics": metrics,
    }


def _last_step(run: RunFolder) -> int:
    return max((each["step"] for each in run.read_metrics()), default=0)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def resume(work: Work, record: Record) -> Record:
    """Run the command of the training again, and compare the steps done twice.

    Raises:
        UserError: if the run does not go on from the checkpoint to the last step.
    """
    said = work.command("resume", *work.training)
    first = record["phases"]["train"]
    begun = [int(step) for step in re.findall(r"from step (\d+)", said)]
    metrics = work.run.read_metrics()
    if begun != [first["checkpoint"]] or [each["step"] for each in metrics] != [
        *range(1, work.recipe.training.steps + 1)
    ]:
        raise UserError(f"went on from step {begun}, with metrics of {len(metrics)} steps")
    before = {each["step"]: each for each in first["metrics"] if each["step"] > begun[0]}
    repeated = [
        {"step": step} | {name: [row[name], metrics[step - 1][name]] for name in SAME}
        for step, row in before.items()
    ]
    differing = [row["step"] for row in repeated if any(len({*row[name]}) > 1 for name in SAME)]
    return {"from": begun[0], "repeated": repeated, "differing": differing, "metrics": metrics}


def export(work: Work, record: Record) -> Record:
    """Write the model in the format of Hugging Face."""
    work.command("export", *DAPE, "export", work.run, "--out", work.exported)
    return {"bytes": _bytes(work.exported)}


def evaluate(work: Work, record: Record) -> Record:
    """Measure perplexity by length with the exported folder."""
    from dape.evaluate.record import load as read_evaluation

    precision = PRECISIONS[work.recipe.training.precision]
    words = ("eval", work.exported, "--data", work.recipe.data, "--lengths", work.lengths)
    out = work.folder / "evaluation"
    work.command("evaluate", *DAPE, *words, "--precision", precision, "--out", out)
    (file,) = out.rglob("*.json")
    found = read_evaluation(file)
    return {
        "precision": precision,
        "documents": len(found.targets.documents),
        "perplexity": {each.length: each.perplexity for each in found.measurements},
        "loss": {each.length: each.loss for each in found.measurements},
        "loss_error": {each.length: each.loss_error for each in found.measurements},
    }


def load(work: Work, record: Record) -> Record:
    """Load the folder by transformers in a fresh process, and generate."""
    said = work.command("load", sys.executable, __file__, "--load", work.exported)
    return json.loads(next(line for line in said.splitlines() if line.startswith("{")))


DAPE = (sys.executable, "-m", "dape")
PHASES: dict[str, Callable[[Work, Record], Record]] = {
    each.__name__: each for each in (train, resume, export, evaluate, load)
}


def loaded(folder: Path) -> Record:
    """Return the model in a folder as transformers loads it, and a sentence it goes on with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import dape  # noqa: F401  announces the architecture

    gpu = torch.cuda.is_available()
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to("cuda" if gpu else "cpu").eval()
    seconds = time.perf_counter() - begun
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(SENTENCE, return_tensors="pt").input_ids.to(model.device)
    text = tokenizer.decode(model.generate(tokens, max_new_tokens=24, do_sample=False)[0])
    return {
        "class": type(model).__name__,
        "dtypes": sorted({str(each.dtype) for each in model.parameters()}),
        "parameters": model.num_parameters(),
        "from_pretrained_seconds": seconds,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "text": text,
    }


def prepared(arguments: argparse.Namespace, changes: list[str]) -> Work:
    """Return the work, after checks of the recipe, the folder and the disk."""
    from dape.cli.train import parsed
    from dape.train.plan import entries_of
    from dape.train.task import draw

    folder = arguments.folder / arguments.recipe.stem
    if not is_free(folder):
        raise UserError(f"{folder} exists; delete it or give another --folder")
    words = [str(arguments.recipe)]
    words += [word for key, value in CHANGES.items() for word in (f"--{key}", str(value))]
    words += [*changes, "--data", str(arguments.data), "--out", str(folder / "run")]
    recipe = parsed(words).recipe
    with torch.device("meta"):
        parameters = sum(each.numel() for each in draw(recipe, entries_of(recipe)).parameters())
    disk = next(each for each in folder.absolute().parents if each.exists())
    free, needed = shutil.disk_usage(disk).free / 1e9, BYTES * parameters / 1e9
    if free < needed:
        raise UserError(
            f"{folder} needs {needed:.0f} GB for {parameters:,} parameters, and {free:.0f} GB are"
            " free; give another --folder"
        )
    training = launch.torchrun(arguments.gpus, "-m", "dape", "train", *words)
    return Work(recipe, training, folder, arguments.lengths, time.time() + 60 * arguments.minutes)


def begun(work: Work, gpus: int) -> Record:
    """Return the record before the first phase."""
    from dape.data.shards import Corpus
    from dape.provenance import provenance
    from dape.train.parallelize import device

    return {
        "recipe": work.folder.name,
        "scheme": work.recipe.scheme,
        "gpus": gpus,
        "training": shlex.join(["torchrun", *work.training[3:]]),
        "data": {"path": work.recipe.data, "checksum": Corpus(work.recipe.data).checksum},
        "provenance": provenance(device(work.recipe.hardware)),
        "phases": {},
    }


def follow(work: Work, record: Record, out: Path) -> None:
    """Run the phases in turn, and keep the record after each.

    Raises:
        UserError: for a phase that fails; the record then has the reason.
    """
    for name, phase in PHASES.items():
        start = time.perf_counter()
        try:
            found = phase(work, record)
        except UserError as reason:
            record["failed"] = {name: str(reason), "metrics": work.run.read_metrics()}
            raise UserError(f"{name}: {reason} ({work.log(name)})") from None
        finally:
            seconds = time.perf_counter() - start
            write_json(out, record)
        record["phases"][name] = {"seconds": seconds} | found
        write_json(out, record)
        print(f"{seconds:.0f} s  {name}", flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--data", type=Path, default=Path("data/books"))
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=25, help="limit of all phases together")
    parser.add_argument("--folder", type=Path, default=Path("runs/large"))
    parser.add_argument("--lengths", default="512,1024,2048")
    parser.add_argument("--out", type=Path, default=Path("results/scaling/run.json"))
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments, changes = parser().parse_known_args(argv)
    if arguments.load:
        print(json.dumps(loaded(arguments.load)))
        return
    if arguments.recipe is None:
        parser().error("name a recipe, such as recipes/2.7b.yaml")
    try:
        check_writable(arguments.out)
        work = prepared(arguments, changes)
        record = begun(work, arguments.gpus)
        follow(work, record, arguments.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    remove(work.folder)
    if different := record["phases"]["resume"]["differing"]:
        sys.exit(f"error: steps {different}, done twice, differ in loss or norm of the gradient")


if __name__ == "__main__":
    main()
