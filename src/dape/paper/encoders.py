"""The Chomsky benchmark as a part of an experiment: cells of encoders trained side by side."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from dape.chomsky import cell as cells
from dape.chomsky.benchmark import SCHEMES, read
from dape.chomsky.tasks import TASKS
from dape.files import read_json
from dape.paper.cells import INSIDE, Cell, Command, Regime, run_folder
from dape.paper.sweep import Options
from dape.paper.sweep import words as chosen
from dape.strict import build
from dape.train.recipe import flat

RECIPE = "recipes/chomsky.yaml"
STEPS = 10_000  # Deletang et al. train a million, the DAPE paper 200,000
LONGEST_TRAINED = 40
# Encoders of short sequences leave a GPU idle, and several tasks train side by side.
GROUPS = {
    "regular": ("even-pairs", "modular-arithmetic-simple", "parity-check", "cycle-navigation"),
    "one-symbol": ("modular-arithmetic", "solve-equation", "missing-duplicate"),
    **{
        name: (name,)
        for name in (
            *("stack-manipulation", "reverse-string", "duplicate-string", "odds-first"),
            *("binary-addition", "binary-multiplication", "compute-sqrt", "bucket-sort"),
        )
    },
}
MAPPED = ("reverse-string", "missing-duplicate", "parity-check", "bucket-sort")
SPEED = "speed.json"
SMALL: Options = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "model.adapter_hidden": 4,
    "training.batch_size": 4,
    "training.length": 4,
    "evaluation.longest": 8,
    "evaluation.samples": 4,
    "device": "cpu",
}


@dataclass(frozen=True, slots=True)
class Encoders:
    """A cell for each scheme and group of tasks, with all seeds and tasks side by side.

    mapped: tasks with a map of the first seed's encoder, for schemes in `map_schemes`.
    options: options of `dape chomsky train` over the recipe, by dotted name.
    """

    groups: Mapping[str, tuple[str, ...]]
    schemes: tuple[str, ...] = SCHEMES
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = STEPS
    mapped: tuple[str, ...] = MAPPED
    map_schemes: tuple[str, ...] = ("kerple", "dape-kerple")
    options: Options = field(default_factory=dict)

    @property
    def regimes(self) -> tuple[Regime, ...]:
        """Return no regimes, because encoders are no language models."""
        return ()

    def cells(self, home: Path, data: Mapping[str, str]) -> Iterator[Cell]:
        """Return the cells, with all settings by name: a changed recipe changes the commands."""
        settings = flat(read(Path(RECIPE)).settings())
        options = {**settings, "training.steps": self.steps, **self.options}
        speeds = _recorded(home)
        for (group, tasks), scheme in product(self.groups.items(), self.schemes):
            name = f"{group}/{scheme}"
            commands = (
                self._train(home, name, tasks, scheme, options),
                *self._maps(home, name, tasks, scheme),
            )
            minutes = self._minutes(speeds, tasks, scheme)
            yield Cell(home, name, scheme, commands, minutes=minutes, timed=True)

    def _train(
        self, home: Path, name: str, tasks: tuple[str, ...], scheme: str, options: Options
    ) -> Command:
        kept = [cells.path(Path(), task, scheme, seed) for task, seed in product(tasks, self.seeds)]
        words = (
            *("chomsky", "train", RECIPE, "--out", str(run_folder(home, name))),
            *("--tasks", *tasks, "--schemes", scheme, "--seeds", *map(str, self.seeds)),
            *("--together", str(len(tasks)), *chosen(options)),
        )
        return Command(words, {path: path for path in (*kept, INSIDE.record)})

    def _maps(
        self, home: Path, name: str, tasks: tuple[str, ...], scheme: str
    ) -> Iterator[Command]:
        run = run_folder(home, name)
        for task in tasks if scheme in self.map_schemes else ():
            if task in self.mapped:
                kept = map_file(task, scheme)
                words = (
                    *("chomsky", "map", str(run), "--task", task, "--scheme", scheme),
                    *("--seed", str(self.seeds[0]), "--out", str(run.path / kept)),
                )
                yield Command(words, {kept: kept})

    def _minutes(self, speeds: "list[_Speed]", tasks: tuple[str, ...], scheme: str) -> float | None:
        """Return the minutes on a GPU, None without the speed of a task."""
        costs = [_cost(speeds, scheme, len(self.seeds), task, self.steps) for task in tasks]
        known = [cost for cost in costs if cost is not None]
        return sum(known) / 60 if len(known) == len(costs) else None

    def tiny(self) -> "Encoders":
        """Return every scheme once, of a size for a CPU."""
        return replace(
            *(self,), groups={"parity": ("parity-check",)}, seeds=(0,), steps=2, options=SMALL
        )


def map_file(task: str, scheme: str) -> Path:
    """Return the path of the map of a task and a scheme in a record."""
    return Path("maps") / task / f"{scheme}.json"


@dataclass(frozen=True, slots=True)
class _Speed:
    """Seconds of the start and of a step of a stack, and of a test of a model at all lengths."""

    task: str
    scheme: str
    models: int
    start: float
    step: float
    test: float


def _recorded(home: Path) -> list[_Speed]:
    """Return the speeds in the record of `benchmarks/chomsky_speed.py`, if any."""
    file = home / SPEED
    return read_json(file, _speeds, "measure it again") if file.is_file() else []


def _speeds(content: Mapping[str, Any]) -> list[_Speed]:
    return [build(_Speed, each) for each in content["prices"]]


def _cost(speeds: list[_Speed], scheme: str, models: int, task: str, steps: int) -> float | None:
    """Return the seconds of a task, from the measured task with the next longer output."""
    longest = TASKS[task].output_length(LONGEST_TRAINED)
    known = {
        TASKS[each.task].output_length(LONGEST_TRAINED): each
        for each in speeds
        if (each.scheme, each.models) == (scheme, models)
    }
    if not known:
        return None
    longer = [length for length in known if length >= longest]
    like = known[min(longer) if longer else max(known)]
    return like.start + steps * like.step + models * like.test
