"""Experiments whose commands are pretended: what a training and an evaluation leave, at once."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import evaluations
import folders
from dape.paper.spread import Workers
from dape.paper.sweep import Sweep, schemes
from dape.runs import RunFolder
from dape.train.recipe import Recipe, read

ROOT = Path(__file__).parents[2]
LENGTHS = (32, 64, 128, 256, 512)
SPREAD = 0.001  # of the losses, for each seed and letter of the scheme


def enter(tmp_path, monkeypatch):
    """Work in a folder with the recipes and a corpus."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    folders.prepare(tmp_path / "made", sizes=[600, 700, 650])
    (tmp_path / "data").mkdir()
    (tmp_path / "made/data").rename(tmp_path / "data/python-stdlib")
    monkeypatch.chdir(tmp_path)


def sweep(*names, **options):
    arms = schemes(*(names or ("kerple", "dape-kerple")))
    chosen = {"tokens": (2**13,), "reads": "32,...,512"} | options
    return Sweep("smoke", ("python-stdlib",), (32,), arms, **chosen)


def cells(*names, **options):
    return list(sweep(*names, **options).cells(Path("runs/smoke"), {}))


@dataclass(slots=True)
class Pretended(Workers):
    """Workers that write what each command would; `fails` maps a part of one to its last words."""

    fails: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)
    losses: dict = field(default_factory=dict)

    def sees(self, device):
        return True

    def call(self, words, device, log):
        self.calls.append((words, device))
        for part, last in self.fails.items():
            if part in " ".join(words):
                log.write(f"much\n{last}\n".encode())
                return 2
        (train if words[0] == "train" else self.measure)(words)
        return 0

    def measure(self, words):
        run = RunFolder(Path(words[1]))
        recipe = read(run.recipe, Recipe)
        scheme = recipe.model.scheme
        base = self.losses.get(scheme, [2.0] * len(LENGTHS))
        losses = [loss + SPREAD * recipe.seed * len(scheme) for loss in base]
        made = evaluations.make(
            scheme, losses, seed=recipe.seed, train_length=32, lengths=LENGTHS, run=str(run)
        )
        made.save(run.evaluation("last"))


def train(words):
    """Leave what `dape train` leaves: the recipe with the options, a record and metrics.

    A finished run stays as it is.
    """
    data = yaml.safe_load(Path(words[1]).read_text())
    for name, value in zip(words[2::2], words[3::2], strict=True):
        *sections, key = name.removeprefix("--").replace("-", "_").split(".")
        section = data
        for each in sections:
            section = section.setdefault(each, {})
        section[key] = yaml.safe_load(value)
    run = RunFolder(Path("runs") / data["name"])
    if run.finished:
        return
    run.path.mkdir(parents=True, exist_ok=True)
    run.recipe.write_text(yaml.safe_dump(data))
    made = {"tokens": 8448, "validation_loss": 2.5, "seconds": 6.0 + data["seed"], "ended": "now"}
    run.record.write_text(json.dumps(made))
    run.metrics.write_text('{"step": 16, "validation_loss": 2.5, "tokens_per_second": 1000}\n')
    for folder in (run.model, run.checkpoints):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
