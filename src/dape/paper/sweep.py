"""Parts of an experiment: sweeps over regimes, arms and seeds, and the cells that follow."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from dape.paper.cells import INSIDE, TRAINED, Cell, Command, Regime, Training, run_folder
from dape.runs import RunFolder
from dape.train.recipe import Recipe, override, read

LONGEST = 16_384
TINY = Regime("smoke", "python-stdlib", 32, 2**13)
TINY_READS = "32,...,512"
# Below a run folder.
CONTEXT, LEARNED, COSTS = INSIDE.context(), "learned", Path("results.json")
Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """A recipe, the tokens of a step, and the tokens of a micro-batch (None: the whole step)."""

    recipe: str
    step: int
    micro: int | None = None


SIZES = {
    "small": Size("recipes/paper/small.yaml", 2**16, 2**15),
    "125m": Size("recipes/paper/125m.yaml", 2**16, 2**15),
    "350m": Size("recipes/paper/350m.yaml", 2**16, 2**14),
    "smoke": Size("recipes/paper/smoke.yaml", 2**9),
    "demo": Size("recipes/demo.yaml", 2**11),
    "cpu": Size("recipes/cpu.yaml", 2**12),
    "retrofit": Size("recipes/retrofit-base.yaml", 2**15, 2**15),
}
# Corpora for the test of a model trained on the mixed corpus, in turn.
MEASURED_ON = {"mixed": ("arxiv", "books")}


@dataclass(frozen=True, slots=True)
class Arm:
    """A label, and options over the recipe by dotted name; `minutes` is an estimate, if any."""

    label: str
    options: Options
    minutes: float | None = None


def schemes(*names: str) -> tuple[Arm, ...]:
    """Return arms that differ only in the scheme."""
    return tuple(Arm(name, {"model.scheme": name}) for name in names)


@dataclass(frozen=True, slots=True)
class Measure:
    """A further command on every run: words after `dape`, and the files of the run folder to keep.

    In words and files, {run} is the run folder, {reads} the lengths to read, and {length} is
    `times` the training length.
    """

    words: tuple[str, ...]
    keeps: tuple[str, ...]
    times: int = 1

    def command(self, run: RunFolder, regime: Regime, reads: str) -> Command:
        """Return the command on a run."""
        length = self.times * regime.length
        kept = [Path(each.format(length=length)) for each in self.keeps]
        words = (word.format(run=run, length=length, reads=reads) for word in self.words)
        return Command(tuple(words), {file: file for file in kept})


USES = Measure(("eval", "context", "{run}", "--lengths", "{reads}"), (str(CONTEXT),))


def heads(times: int) -> Measure:
    """Return the measurement of A, B and f(A, B) of the last query of a text."""
    kept = f"{LEARNED}/{{length}}.json"
    words = ("plot", "learned", "{run}", "--length", "{length}", "--out", f"{{run}}/{kept}")
    return Measure(words, (kept,), times)


@dataclass(frozen=True, slots=True)
class Sweep:
    """All arms with all seeds in all regimes, measured at the lengths in `reads`.

    `reads` is the value of `dape eval --lengths`, with {length} for the training length; `options`
    are further words of `dape eval`, and `measures` further commands.
    """

    size: str
    corpora: tuple[str, ...]
    lengths: tuple[int, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0,)
    tokens: tuple[int, ...] = (150_000_000,)
    reads: str = f"{{length}},...,{LONGEST}"
    options: tuple[str, ...] = ()
    measures: tuple[Measure, ...] = ()

    @property
    def regimes(self) -> tuple[Regime, ...]:
        """Return the regimes."""
        combined = product(self.corpora, self.lengths, self.tokens)
        return tuple(Regime(self.size, *values) for values in combined)

    def cells(self, home: Path, data: Mapping[str, str]) -> Iterator[Cell]:
        """Return the cells; `data` maps corpora to folders other than data/CORPUS."""
        for regime, arm, seed in product(self.regimes, self.arms, self.seeds):
            name = f"{regime.name}/{arm.label}-{seed}"
            options = {
                "name": f"{home.name}/{name}",
                "seed": seed,
                "data": data_folder(regime.corpus, data),
                **regime_options(regime),
                **arm.options,
            }
            file = SIZES[regime.size].recipe
            training = Training(
                regime, seed, options["data"], override(read(file, Recipe), options)
            )
            train = Command(("train", file, *words(options)), TRAINED)
            measured = self._measured(run_folder(home, name), regime, data)
            yield Cell(home, name, arm.label, (train, *measured), training)

    def _measured(
        self, run: RunFolder, regime: Regime, data: Mapping[str, str]
    ) -> Iterator[Command]:
        lengths = self.reads.format(length=regime.length)
        for corpus in MEASURED_ON.get(regime.corpus, (regime.corpus,)):
            own = corpus == regime.corpus
            on = () if own else ("--data", data_folder(corpus, data))
            yield Command(
                ("eval", str(run), "--lengths", lengths, *self.options, *on),
                {evaluation(regime, corpus): INSIDE.evaluation("last")},
            )
        for measure in self.measures:
            yield measure.command(run, regime, lengths)

    def tiny(self) -> "Sweep":
        """Return every arm once, with a tiny model of bytes on a CPU."""
        return Sweep(
            *(TINY.size, (TINY.corpus,), (TINY.length,), self.arms),
            tokens=(TINY.tokens,),
            reads=TINY_READS,
            measures=self.measures,
        )


@dataclass(frozen=True, slots=True)
class Bench:
    """Time and memory of models of a size by `dape bench model`, and a cell per length.

    `options` are further words of the command, and `minutes` an estimate for a cell. `gpu` says
    that the measurement is of a GPU.
    """

    size: str
    direction: str
    schemes: tuple[str, ...]
    lengths: tuple[int, ...]
    minutes: float
    options: tuple[str, ...] = ()
    gpu: bool = True

    @property
    def name(self) -> str:
        """Return the name, as `cost-125m-training`."""
        return f"cost-{self.size}-{self.direction}"

    @property
    def regimes(self) -> tuple[Regime, ...]:
        """Return no regimes."""
        return ()

    def cells(self, home: Path, data: Mapping[str, str]) -> Iterator[Cell]:
        """Yield a cell per length, so that an interruption loses little."""
        for length in self.lengths:
            name = f"{self.name}/{length}"
            words = (
                *("bench", "model", "--sizes", self.size, "--schemes", ",".join(self.schemes)),
                *("--directions", self.direction, *self.options),
                *("--lengths", str(length), "--out", str(run_folder(home, name))),
            )
            command = Command(words, {COSTS: COSTS})
            yield Cell(home, name, self.name, (command,), minutes=self.minutes, gpu=self.gpu)

    def tiny(self) -> "Bench":
        """Return the measurement of a small model on a CPU, the same for every size."""
        return Bench(
            "small",
            self.direction,
            ("nope", "dape-kerple"),
            lengths=(32,),
            minutes=1.0,
            options=("--vocab-size", "512"),
            gpu=False,
        )


def data_folder(corpus: str, data: Mapping[str, str]) -> str:
    """Return the folder of a corpus."""
    return data.get(corpus, f"data/{corpus}")


def evaluation(regime: Regime, corpus: str) -> Path:
    """Return the path in a record of the evaluation on a corpus."""
    kept = INSIDE.evaluation("last")
    return kept if corpus == regime.corpus else kept.with_stem(f"last-{corpus}")


def regime_options(regime: Regime) -> Options:
    """Return a regime as options over the recipe of the size; the last step is whole."""
    size = SIZES[regime.size]
    micro = {"hardware.micro_batch_size": size.micro // regime.length} if size.micro else {}
    return {
        "training.length": regime.length,
        "training.batch_size": size.step // regime.length,
        "training.steps": -(-regime.tokens // size.step),
        **micro,
    }


def words(options: Options) -> tuple[str, ...]:
    """Return options as words of a command: `--model.scheme-options '{adapter: {hidden: 4}}'`."""
    found: list[str] = []
    for name, value in options.items():
        if isinstance(value, dict):
            value = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
        found += [f"--{name.replace('_', '-')}", str(value).strip()]
    return tuple(found)
