"""Parts of an experiment that fine-tune pretrained models by `dape retrofit`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dape.paper.cells import INSIDE, TRAINED, Cell, Command, Regime, Training
from dape.paper.sweep import TINY, Arm, Measure, Options, Sweep, data_folder, words
from dape.train.recipe import Recipe, Retrofit, override, read

LAST = INSIDE.evaluation("last")
SMALL: Options = {
    "training.length": 2 * TINY.length,
    "training.batch_size": 4,
    "training.steps": 2,
    "training.precision": "fp32",
    "tracking.validation_batches": 1,
    "hardware.device": "cpu",
}


@dataclass(frozen=True, slots=True)
class Tuning:
    """Models trained by a sweep, and arms that fine-tune every model by `dape retrofit`."""

    base: Sweep
    recipe: str
    arms: tuple[Arm, ...]
    options: Options

    @property
    def regimes(self) -> tuple[Regime, ...]:
        """Return the regimes of the base models."""
        return self.base.regimes

    def cells(self, home: Path, data: Mapping[str, str]) -> Iterator[Cell]:
        """Return the cells of the base models, followed by the cells of their fine-tuning."""
        for base in self.base.cells(home, data):
            yield base
            assert base.training is not None and isinstance(base.training.recipe, Recipe)
            regime, seed, own = base.training.regime, base.training.seed, base.training.recipe
            reads = ("--lengths", self.base.reads.format(length=regime.length))
            for arm in self.arms:
                chosen = replace(arm, options={**self.options, **arm.options})
                folder = base.training.data
                cell = _cell(home, regime, chosen, seed, folder, str(base.run), self.recipe, reads)
                assert cell.training is not None
                yield replace(cell, needs=base.name, training=replace(cell.training, base=own))

    def tiny(self) -> "Tuning":
        """Return every arm once, with a tiny model of bytes on a CPU."""
        arms = tuple(replace(arm, options={**arm.options, **SMALL}) for arm in self.arms)
        return replace(self, base=self.base.tiny(), arms=arms)


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model of others in a folder, and arms with all seeds that fine-tune the model.

    An arm with 0 steps measures the model without training. `options` are options of all arms,
    `reads` the measured lengths, or None for the validation loss alone, and `words` further words
    of `dape retrofit`.
    """

    folder: str
    regime: Regime
    recipe: str
    arms: tuple[Arm, ...]
    options: Options
    seeds: tuple[int, ...] = (0,)
    reads: str | None = None
    words: tuple[str, ...] = ()
    measures: tuple[Measure, ...] = ()

    @property
    def regimes(self) -> tuple[Regime, ...]:
        """Return the single regime."""
        return (self.regime,)

    def cells(self, home: Path, data: Mapping[str, str]) -> Iterator[Cell]:
        """Return the cells, seed by seed."""
        place = data_folder(self.regime.corpus, data)
        reads = ("--lengths", self.reads, "--measure", "run") if self.reads else ()
        more = (*(reads or ("--measure", "none")), *self.words)
        for seed in self.seeds:
            for arm in self.arms:
                chosen = replace(arm, options={**self._options(), **arm.options})
                cell = _cell(home, self.regime, chosen, seed, place, self.folder, self.recipe, more)
                measured = (
                    each.command(cell.run, self.regime, self.reads or "") for each in self.measures
                )
                yield replace(cell, commands=(*cell.commands, *measured))

    def _options(self) -> Options:
        """Return the options of all arms; the last step is whole."""
        step = self.options["training.batch_size"] * self.regime.length
        return {
            "training.length": self.regime.length,
            "training.steps": -(-self.regime.tokens // step),
            **self.options,
        }

    def tiny(self) -> Tuning:
        """Return every arm once on a tiny model of ours, which lacks the changed keys.

        The base has half the tokens, because arms of trainings have the same names.
        """
        kept = ("model.adapter", "model.train", "model.options", "optimizer.learning_rate")
        arms = tuple(
            replace(arm, options={key: arm.options[key] for key in kept if key in arm.options})
            for arm in self.arms
        )
        tiny = Tuning(Sweep("", (), (), (BASE,)), self.recipe, arms, {}).tiny()
        return replace(tiny, base=replace(tiny.base, tokens=(TINY.tokens // 2,)))


BASE = Arm("base", {"model.scheme": "rope"})


def _cell(
    home: Path,
    regime: Regime,
    arm: Arm,
    seed: int,
    data: str,
    base: str,
    recipe: str,
    more: tuple[str, ...],
) -> Cell:
    """Return the cell of `dape retrofit` on the model in the folder `base`."""
    name = f"{regime.name}/{arm.label}-{seed}"
    options = {"name": f"{home.name}/{name}", "seed": seed, "data": data, **arm.options}
    chosen = override(read(recipe, Retrofit), {**options, "model.base": base})
    tuned = ("retrofit", base, "--recipe", recipe, *words(options), *more)
    kept = {**TRAINED, LAST: LAST} if "--lengths" in more else TRAINED
    training = Training(regime, seed, data, chosen)
    return Cell(home, name, arm.label, (Command(tuned, kept),), training, minutes=arm.minutes)
