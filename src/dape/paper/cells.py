"""Cells: what a sweep over settings, arms and seeds trains and measures, as commands.

| word | meaning |
|---|---|
| arm | one column of a comparison: options over a recipe, usually the scheme alone |
| setting | size of the model, corpus, training length and tokens: what all arms of a table share |
| cell | one arm in one setting with one seed: a training and its measurements |
| step | one command of a cell, and the files of the run folder that are kept |
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from dape.runs import RunFolder
from dape.train import strict
from dape.train.config import Recipe

TOKENS = 150_000_000
LONGEST = 16_384
Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """A recipe, the tokens of a step, and those of a micro-batch (None: the whole step)."""

    recipe: str
    step: int
    micro: int | None = None


SIZES = {
    "small": Size("recipes/paper/small.yaml", 2**16, 2**15),
    "125m": Size("recipes/paper/125m.yaml", 2**16, 2**14),
    "350m": Size("recipes/paper/350m.yaml", 2**16, 2**13),
    "smoke": Size("recipes/paper/smoke.yaml", 2**9),
    "demo": Size("recipes/demo.yaml", 2**11),
    "cpu": Size("recipes/cpu.yaml", 2**12),
}
# Corpora whose test texts a model trained on both is measured on, one after the other.
MEASURED_ON = {"mixed": ("arxiv", "books")}


@dataclass(frozen=True, slots=True)
class Arm:
    """A label, and options over the recipe by their dotted names."""

    label: str
    options: Options


def schemes(*names: str) -> tuple[Arm, ...]:
    """Return the arms that differ in nothing but the scheme."""
    return tuple(Arm(name, {"model.scheme": name}) for name in names)


@dataclass(frozen=True, slots=True)
class Setting:
    """What all arms of a table share; `length` and `tokens` are those of the training."""

    size: str
    corpus: str
    length: int
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        """Return the name, as `125m-arxiv-512-150M`."""
        amount = f"{self.tokens / 1e6:.3g}M" if self.tokens >= 1e6 else f"{self.tokens / 1e3:.3g}k"
        return f"{self.size}-{self.corpus}-{self.length}-{amount}"

    @property
    def steps(self) -> int:
        """Return the updates that make up the tokens, the last one whole."""
        return -(-self.tokens // SIZES[self.size].step)

    def options(self) -> Options:
        """Return the setting as options over the recipe of its size."""
        size = SIZES[self.size]
        micro = {"hardware.micro_batch_size": size.micro // self.length} if size.micro else {}
        return {
            "training.length": self.length,
            "training.batch_size": size.step // self.length,
            "training.steps": self.steps,
            **micro,
        }


@dataclass(frozen=True, slots=True)
class Step:
    """The words after `dape`, and the files to keep.

    keeps: the path of each file below the run folder, by its path below the record.
    """

    words: tuple[str, ...]
    keeps: Mapping[Path, Path]


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm in one setting with one seed; `recipe` is what its training must have used.

    The run folder is runs/GROUP/NAME, the record HOME/cells/NAME with GROUP the last part of HOME.
    """

    home: Path
    setting: Setting
    arm: str
    seed: int
    data: str
    recipe: Recipe
    steps: tuple[Step, ...]

    @property
    def name(self) -> str:
        """Return the name, as `125m-arxiv-512-150M/kerple-0`."""
        return f"{self.setting.name}/{self.arm}-{self.seed}"

    @property
    def run(self) -> RunFolder:
        """Return where it is trained and measured."""
        return RunFolder(self.recipe.folder)

    @property
    def record(self) -> RunFolder:
        """Return where its small results are kept, laid out as a run folder."""
        return RunFolder(self.home / "cells" / self.name)


@dataclass(frozen=True, slots=True)
class Sweep:
    """All arms with all seeds in all settings, measured at the lengths that `reads` gives.

    `reads` is the value of `dape eval --lengths`, with {length} for the training length; `options`
    are further words of that command.
    """

    size: str
    corpora: tuple[str, ...]
    lengths: tuple[int, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0,)
    tokens: tuple[int, ...] = (TOKENS,)
    reads: str = f"{{length}},...,{LONGEST}"
    options: tuple[str, ...] = ()

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Return the settings."""
        combined = product(self.corpora, self.lengths, self.tokens)
        return tuple(Setting(self.size, *values) for values in combined)

    def cells(self, home: Path, data: Mapping[str, str]) -> Iterator[Cell]:
        """Return the cells; `data` names the folders of corpora that are not data/CORPUS."""
        for setting, arm, seed in product(self.settings, self.arms, self.seeds):
            yield self._cell(home, data, setting, arm, seed)

    def _cell(
        self, home: Path, data: Mapping[str, str], setting: Setting, arm: Arm, seed: int
    ) -> Cell:
        folder = data_folder(setting.corpus, data)
        recipe = SIZES[setting.size].recipe
        options = {
            "name": f"{home.name}/{setting.name}/{arm.label}-{seed}",
            "seed": seed,
            "data": folder,
            **setting.options(),
            **arm.options,
        }
        built = build(recipe, options)
        train = Step(("train", recipe, *words(options)), _TRAINED)
        measures = [
            self._measure(built.folder, setting, corpus, data)
            for corpus in MEASURED_ON.get(setting.corpus, (setting.corpus,))
        ]
        return Cell(home, setting, arm.label, seed, folder, built, (train, *measures))

    def _measure(self, run: Path, setting: Setting, corpus: str, data: Mapping[str, str]) -> Step:
        own = corpus == setting.corpus
        on = () if own else ("--data", data_folder(corpus, data))
        lengths = self.reads.format(length=setting.length)
        return Step(
            ("eval", str(run), "--lengths", lengths, *self.options, *on),
            {evaluation(setting, corpus): _INSIDE.evaluation("last")},
        )


_INSIDE = RunFolder(Path())
_TRAINED = {path: path for path in (_INSIDE.recipe, _INSIDE.record, _INSIDE.metrics)}


def once(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells, each name once, with the steps that any of its namesakes has."""
    found: dict[tuple[Path, str], Cell] = {}
    for cell in cells:
        key = cell.home, cell.name
        known = found.setdefault(key, cell)
        steps = {step.words: step for step in (*known.steps, *cell.steps)}
        found[key] = replace(known, steps=tuple(steps.values()))
    return list(found.values())


def by_setting(cells: Iterable[Cell]) -> dict[Setting, list[Cell]]:
    """Return the cells of each setting, in order of appearance."""
    found: dict[Setting, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.setting, []).append(cell)
    return found


def data_folder(corpus: str, data: Mapping[str, str]) -> str:
    """Return the folder of a corpus."""
    return data.get(corpus, f"data/{corpus}")


def evaluation(setting: Setting, corpus: str) -> Path:
    """Return where a record keeps the evaluation on the test texts of a corpus."""
    kept = _INSIDE.evaluation("last")
    return kept if corpus == setting.corpus else kept.with_stem(f"last-{corpus}")


def build(recipe: str, options: Options, kind: type[Recipe] = Recipe) -> Recipe:
    """Return the recipe in a file with options, by their dotted names, put over it.

    Raises:
        UserError: for a file that cannot be read, or options that its sections refuse.
    """
    data = strict.load(Path(recipe))
    for name, value in options.items():
        *sections, key = name.split(".")
        section = data
        for each in sections:
            section = section.setdefault(each, {})
        section[key] = value
    built: Recipe = strict.build(kind, data)
    return built


def words(options: Options) -> tuple[str, ...]:
    """Return options as words of a command: `--model.scheme-options '{adapter: {hidden: 4}}'`."""
    found: list[str] = []
    for name, value in options.items():
        text = yaml.safe_dump(value, default_flow_style=True) if isinstance(value, dict) else value
        found += [f"--{name.replace('_', '-')}", str(text).strip()]
    return tuple(found)
