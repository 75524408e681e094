"""An experiment as data: sweeps, and claims of the paper to decide."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dape.errors import unknown
from dape.paper.cells import Cell, Regime, once
from dape.paper.claims import Claim
from dape.paper.encoders import Encoders
from dape.paper.sweep import MEASURED_ON, TINY, Bench, Sweep
from dape.paper.tuning import Pretrained, Tuning

Part = Sweep | Tuning | Pretrained | Bench | Encoders


@dataclass(frozen=True, slots=True)
class Experiment:
    """An experiment: sweeps over regimes, with a table and a figure per regime, and claims.

    `shows` names the reproduced tables and figures, and `sections` the kinds of results
    (`results.SECTIONS`). Results lie in `folder`. Records of cells lie in `home`, shared by
    experiments.
    """

    name: str
    title: str
    shows: str
    parts: tuple[Part, ...]
    claims: tuple[Claim, ...] = ()
    home: Path = Path("results/paper")
    sections: tuple[str, ...] = ("curves",)

    @property
    def folder(self) -> Path:
        """Return the folder for tables, figures and verdicts."""
        return self.home if self.home.name == self.name else self.home / self.name

    @property
    def regimes(self) -> tuple[Regime, ...]:
        """Return the regimes of all parts, without repetition."""
        return tuple(dict.fromkeys(regime for part in self.parts for regime in part.regimes))

    def cells(self, data: Mapping[str, str] | None = None) -> list[Cell]:
        """Return the cells of all parts, without repetition."""
        return once(cell for part in self.parts for cell in part.cells(self.home, data or {}))


def smoke(experiment: Experiment) -> Experiment:
    """Return the experiment in miniature: every arm once, with a tiny model of bytes on a CPU."""
    parts = tuple(part.tiny() for part in experiment.parts)
    small = replace(experiment, parts=parts, home=Path("runs/smoke"))
    (tiny,) = small.regimes or (TINY,)
    return replace(small, claims=tuple(each.moved(lambda regime: tiny) for each in small.claims))


def check_data(experiments: Iterable[Experiment], data: Mapping[str, str]) -> None:
    """Refuse names of corpora that no experiment reads.

    Raises:
        UserError: naming the corpora.
    """
    own = {regime.corpus for each in experiments for regime in each.regimes}
    known = own.union(*(MEASURED_ON.get(name, ()) for name in own))
    for name in data:
        if name not in known:
            raise unknown("corpus", name, known)
