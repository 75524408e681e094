"""Faults on purpose: what `dape` makes of kills, full disks, damaged and hostile files, nonsense.

    python benchmarks/campaign [--parts kills,...] [--every 1] [--only train,...]

Prints what ended wrongly, and a table: how many trials of each part and kind there were, how they
ended, how many wrongly. `--every N` takes each N-th trial, `--only` some of the commands that are
killed, stopped or run on full disks, and of the folders that are damaged. Mounts small disks, for
which it must be root; without that the part `disks` is left out. Exits with 1 if a trial ended
wrongly.
"""

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_OFFLINE": "1",
}

import argparse
import gc
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import damage
import disks
import hostile
import kills
import nonsense
import stage as stages
from result import Result

from dape.cli import COMMANDS

PARTS = {
    "kills": kills.kills,
    "two at once": kills.two_at_once,
    "disks": disks.disks,
    "damaged": damage.damaged,
    "unreadable": damage.unreadable,
    "hostile": hostile.hostile,
    "nonsense": nonsense.nonsense,
}
PACKAGES = ("chomsky", "data", "evaluate", "figures", "model", "train")
WARM = (
    "lightning_fabric",
    "torch.utils.tensorboard",
    "torch.distributed.checkpoint",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "datasets",
    "seaborn",
    "matplotlib.backends.backend_svg",
    "jinja2",
    "importlib.readers",
    "tyro._backends._tyro_backend",
    "typeguard",
    "requests",
)


def main() -> int:
    """Run the parts, print the table and the faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    for choice in (kills.COMMANDS, damage.READERS) if arguments.only else ():
        for name in choice.keys() - set(arguments.only.split(",")):
            del choice[name]
    warm()
    wrong = False
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        room = Path(name).resolve()
        stage = stages.build(room / "stage")
        print("| part | kind | trials | outcomes | wrong |\n| --- | --- | ---: | --- | ---: |")
        for part in arguments.parts.split(","):
            begun, results = time.monotonic(), []
            for result in PARTS[part](stage, room, arguments.every):
                results.append(result)
                if result.fault:
                    fault = f"FAULT {result.part}, {result.kind}, {result.name}: {result.fault}"
                    print(fault, file=sys.stderr, flush=True)
            print(rows(results), flush=True)
            print(f"{part}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
            wrong |= any(result.fault for result in results)
    return int(wrong)


def warm() -> None:
    """Import all that commands import, so that no trial has to."""
    packages = [f"dape.{name}" for name in PACKAGES]
    paths = [(import_module(name).__path__, f"{name}.") for name in packages]
    ours = [module.name for path in paths for module in walk_packages(*path)]
    ours += [f"dape.cli.{each.replace(' ', '_')}" for each in COMMANDS]
    for name in (*ours, *WARM):
        try:
            import_module(name)
        except ImportError:
            print(f"{name} is not installed", file=sys.stderr)
    with suppress(ImportError):  # lm-eval describes the machine, by `pip list` and other programs
        import_module("lm_eval.evaluator").add_env_info = lambda results: None
    gc.collect()
    gc.freeze()  # a trial need neither look through the imports nor copy them


def rows(results: Iterable[Result]) -> str:
    """Return the counts of each kind as rows of a table."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    faults: Counter[tuple[str, str]] = Counter()
    for each in results:
        counts[each.part, each.kind][each.outcome] += 1
        faults[each.part, each.kind] += bool(each.fault)
    lines = []
    for (part, kind), outcomes in counts.items():
        listed = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
        total = sum(outcomes.values())
        lines.append(f"| {part} | {kind} | {total} | {listed} | {faults[part, kind]} |")
    return "\n".join(lines)


sys.exit(main())
